/* What a function answers when the world does not cooperate, and the check for our own mistakes.
 *
 * A fact of the world (a file, a peer, memory, what a user typed) is a returned enum status that may not be ignored.
 * The first function that knows what went wrong writes the message with status_fail: what, where, what was expected,
 * what was found, what to do. Those above pass the code on with TRY. Only cli/ prints it and exits.
 */
#pragma once

enum status {
    STATUS_OK = 0,
    STATUS_USAGE,       /* a mistake in the call or in a setting; the program exits with 2 */
    STATUS_NOT_FOUND,   /* a file or directory that is not there */
    STATUS_IO,          /* the system refused to open, read, write, flush or rename */
    STATUS_FORMAT,      /* a file is not what its format promises */
    STATUS_MEMORY,      /* no memory */
    STATUS_NUMERIC,     /* a number is not what it must be: not finite, or damaged */
    STATUS_PEER,        /* another rank is gone, or failed at something that all do together */
    STATUS_INTERRUPTED, /* the user asked to stop; what was running is saved */
};

#define MUST_USE __attribute__((warn_unused_result))
#define PRINTF_LIKE(format_at, first_at) __attribute__((format(printf, format_at, first_at)))

/* Record a message for this thread (one line, no newline) and return `code`, which must not be STATUS_OK. */
enum status status_fail(enum status code, const char *format, ...) PRINTF_LIKE(2, 3);

/* Put "prefix: " before the message recorded last on this thread; returns `code`, and does nothing for STATUS_OK. */
enum status status_prefix(enum status code, const char *format, ...) PRINTF_LIKE(2, 3);

/* The message of the last failure on this thread; "" if there was none. Borrowed until the next failure. */
const char *status_text(void);

/* Return from the calling function with the status of `expression` unless it is STATUS_OK. */
#define TRY(expression)                                                                                      \
    do {                                                                                                     \
        enum status try_status_ = (expression);                                                              \
        if (try_status_ != STATUS_OK)                                                                        \
            return try_status_;                                                                              \
    } while (0)

/* Our own mistake: always on, prints where and what, then aborts. Never for anything a file or a user can cause. */
#define CHECK(condition)                                                                                     \
    ((condition) ? (void)0 : check_failed(__FILE__, __LINE__, __func__, #condition, 0, 0, 0))
#define CHECK_OP(left, op, right)                                                                            \
    (((left)op(right)) ? (void)0                                                                             \
                       : check_failed(__FILE__, __LINE__, __func__, #left " " #op " " #right, 1,             \
                                      (long long)(left), (long long)(right)))

_Noreturn void check_failed(const char *file, int line, const char *function, const char *condition,
                            int has_values, long long left, long long right);
