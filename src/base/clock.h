/* Time. Monotonic for measuring, wall for records. */
#pragma once

double clock_seconds(void);      /* monotonic, seconds since an arbitrary start */
double clock_thread_seconds(void); /* processor time of the calling thread */
double clock_wall_seconds(void); /* seconds since 1970-01-01 UTC */
