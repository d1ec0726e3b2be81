# Cross-compile for a platform of edgelm/system/platforms.py with the clang of the ziglang wheel, which brings every C
# library:
#   cmake -S runtimes/csrc -B BUILD -DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake -DEDGELM_ZIG=PATH/ziglang/zig \
#     -DEDGELM_TARGET=aarch64-linux-gnu.2.17
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES EDGELM_ZIG EDGELM_TARGET)
if(NOT EDGELM_ZIG OR NOT EDGELM_TARGET)
  message(FATAL_ERROR "Give -DEDGELM_ZIG=PATH/ziglang/zig and -DEDGELM_TARGET=, such as aarch64-linux-gnu.2.17")
endif()

string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR ${EDGELM_TARGET})
if(EDGELM_TARGET MATCHES "-linux-")
  set(CMAKE_SYSTEM_NAME Linux)
elseif(EDGELM_TARGET MATCHES "-macos")
  set(CMAKE_SYSTEM_NAME Darwin)
elseif(EDGELM_TARGET MATCHES "-windows-")
  set(CMAKE_SYSTEM_NAME Windows)
else()
  message(FATAL_ERROR "No system is known for EDGELM_TARGET=${EDGELM_TARGET}")
endif()

set(CMAKE_C_COMPILER ${EDGELM_ZIG} cc -target ${EDGELM_TARGET})
set(CMAKE_CXX_COMPILER ${EDGELM_ZIG} c++ -target ${EDGELM_TARGET})
# `zig ar` is two words, which CMAKE_AR cannot hold.
foreach(language C CXX)
  set(CMAKE_${language}_ARCHIVE_CREATE "${EDGELM_ZIG} ar qc <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_APPEND "${EDGELM_ZIG} ar q <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_FINISH "${EDGELM_ZIG} ranlib <TARGET>")
endforeach()

# What ships has no symbols but those that it exports. No file is edited when it is installed: this machine's tools know
# its own format only.
foreach(kind EXE SHARED MODULE)
  set(CMAKE_${kind}_LINKER_FLAGS_INIT -s)
endforeach()
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)

set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE NEVER)
