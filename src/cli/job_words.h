/* What a supervisor must know of the command it runs: how many ranks it starts, and where the run is. */
#pragma once

#include "base/status.h"

/* The number in `-n 8`, `-np 8`, `--np 8`, `--ntasks 8` or `--ntasks=8`, behind mpirun, srun or their like where one is named. */
struct rank_words {
    int index;        /* of the word; -1: there is none */
    int prefix_bytes; /* of the word before the number */
    int count;
};
struct rank_words job_words_ranks(char *const *words);

/* The value of the flag's last appearance, as `--flag value` or `--flag=value`; NULL: it is not there. Borrowed. */
const char *job_words_flag(char *const *words, const char *flag);

/* The command with that many ranks (0: as it is), and with {ranks} and {hosts} filled in. Fresh memory, freed in one piece by
 * job_words_free. */
char **job_words_fill(char *const *words, struct rank_words place, int ranks, const char *hosts_path);
void job_words_free(char **words);

/* Whether some word holds `text`. */
int job_words_hold(char *const *words, const char *text);
