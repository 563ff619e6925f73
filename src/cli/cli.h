/* The verbs. Each reads its arguments, calls what does the work, and prints the product on stdout. */
#pragma once

#include "base/status.h"

enum status cmd_train(int argc, char **argv) MUST_USE;
enum status cmd_launch(int argc, char **argv) MUST_USE;
enum status cmd_generate(int argc, char **argv) MUST_USE;
enum status cmd_eval(int argc, char **argv) MUST_USE;
enum status cmd_tokenize(int argc, char **argv) MUST_USE;
enum status cmd_inspect(int argc, char **argv) MUST_USE;
enum status cmd_bench(int argc, char **argv) MUST_USE;

/* The line that says how the verb failed, now instead of at its end: for ranks, which a starter may end any moment. */
void cli_tell_failure(const char *verb);

/* This process prints no line about how its verb failed: another rank does. */
void cli_stay_silent(void);
