/* The summary of a parity report for people, as `edgelm parity` prints it: edgelm/parity/result.py, edgelm/cli/parity.py. */
#ifndef EDGELM_CAPI_PROGRAMS_PARITY_SUMMARY_H_
#define EDGELM_CAPI_PROGRAMS_PARITY_SUMMARY_H_

#include <stdio.h>

#include "capi/programs/json_reader.h"

/* Print the result in one sentence, its evidence, a line for each group of checks, notes, and how many checks passed. */
void print_parity_summary(FILE* file, const json* report);

#endif /* EDGELM_CAPI_PROGRAMS_PARITY_SUMMARY_H_ */
