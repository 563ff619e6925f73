/* The directory of a run: config.ini (resolved), metrics.jsonl, samples.txt, data/, checkpoints/. */
#pragma once

#include "train/run_config.h"

/* Make the directory, or join the run that is there: its config.ini must say what `config` says, except for settings
 * that do not change the numbers, that lengthen the run, or that its checkpoints can go on with as they are (layouts, the
 * islands and when they meet); steps that were measured there are taken over. Otherwise STATUS_USAGE names the first
 * setting that differs. */
enum status run_directory_open(struct run_config *config) MUST_USE;

/* Write the resolved configuration. */
enum status run_directory_write_config(const struct run_config *config) MUST_USE;

/* "run.directory/name" in fresh memory; the caller frees it. */
char *run_directory_path(const struct run_config *config, const char *name);
