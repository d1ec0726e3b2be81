// EDGELM_EXPORT marks what a library exports; all else is hidden.
#ifndef EDGELM_SYSTEM_EXPORT_H_
#define EDGELM_SYSTEM_EXPORT_H_

#if defined(_WIN32)
#define EDGELM_EXPORT __declspec(dllexport)
#else
#define EDGELM_EXPORT __attribute__((visibility("default")))
#endif

#endif  // EDGELM_SYSTEM_EXPORT_H_
