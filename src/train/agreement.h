/* What all ranks of a run must have in common before the first step. Every function is Collective and fails on all ranks
 * where it fails on one, with a line that names the rank. */
#pragma once

#include "comm/comm.h"
#include "data/corpus.h"
#include "train/run_config.h"

/* The same program with the same settings everywhere. */
enum status agreement_settings(struct comm *world, const struct run_config *config) MUST_USE;

/* Rank 0 makes run.directory or joins the run in it, decides what was left to be decided (precision), and all take its
 * settings. */
enum status agreement_directory(struct comm *world, struct run_config *config) MUST_USE;

/* The same tokens everywhere: every rank reads its own files. */
enum status agreement_data(struct comm *world, const struct corpus *corpus) MUST_USE;
