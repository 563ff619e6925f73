/* A model of NCCL for tests, to be loaded in its place (CADRE_NCCL): the same functions over memory of the processor, between threads
 * or processes of one machine. A message is a file in a directory that the id names; a group's sends are written before its receives
 * are waited for, so that it never deadlocks, and everything is done when ncclGroupEnd returns.
 *
 * What the library forbids is an error here, too: calls of another thread's group, counts that do not match, a peer that is oneself or
 * not there, a rank or an id used twice. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, UINT8 = 1, VERSION = 22703 };
enum { GROUP_MOST = 4096, PATH_MOST = 256 };
static const double PATIENCE_S = 60;

struct id {
    char directory[128];
};

struct communicator {
    char directory[128];
    int rank, size;
    long *sent, *received; /* [size] messages so far */
};

struct call {
    struct communicator *comm;
    const char *from;
    char *to;
    size_t bytes;
    int peer;
};

static __thread struct call calls[GROUP_MOST];
static __thread int call_count, depth;

int ncclGetVersion(int *version);
const char *ncclGetErrorString(int code);
int ncclGetUniqueId(struct id *id);
int ncclCommInitRank(void **out, int size, struct id id, int rank);
int ncclCommDestroy(void *out);
int ncclCommAbort(void *comm);
int ncclCommGetAsyncError(void *comm, int *code);
int ncclGroupStart(void);
int ncclGroupEnd(void);
int ncclSend(const void *data, size_t count, int type, int peer, void *comm, void *queue);
int ncclRecv(void *data, size_t count, int type, int peer, void *comm, void *queue);

int ncclGetVersion(int *version) {
    *version = VERSION;
    return SUCCESS;
}

const char *ncclGetErrorString(int code) {
    return code == SYSTEM_ERROR ? "a message was not there in time (model of NCCL)" : "wrong use (model of NCCL)";
}

int ncclGetUniqueId(struct id *id) {
    const char *where = getenv("TMPDIR");
    memset(id, 0, sizeof *id);
    snprintf(id->directory, sizeof id->directory, "%.80s/nccl-model-XXXXXX", where ? where : "/tmp");
    return mkdtemp(id->directory) ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommInitRank(void **out, int size, struct id id, int rank) {
    struct communicator *c = calloc(1, sizeof *c);
    char path[PATH_MOST];
    if (!c || size < 1 || rank < 0 || rank >= size)
        return INVALID_ARGUMENT;
    memcpy(c->directory, id.directory, sizeof c->directory);
    c->rank = rank;
    c->size = size;
    c->sent = calloc(2 * (size_t)size, sizeof *c->sent);
    c->received = c->sent + size;
    snprintf(path, sizeof path, "%s/rank-%d", c->directory, rank);
    if (mkdir(path, 0700) != 0) /* its mail box; there already: the rank was taken */
        return INVALID_USAGE;
    *out = c;
    return SUCCESS;
}

/* The last to leave takes the directory away. */
int ncclCommDestroy(void *out) {
    struct communicator *c = out;
    char path[PATH_MOST];
    snprintf(path, sizeof path, "%s/rank-%d", c->directory, c->rank);
    int code = rmdir(path) == 0 ? SUCCESS : INVALID_USAGE; /* messages that nobody received */
    rmdir(c->directory);
    free(c->sent);
    free(c);
    return code;
}

int ncclCommAbort(void *comm) {
    return ncclCommDestroy(comm), SUCCESS;
}

int ncclCommGetAsyncError(void *comm, int *code) {
    (void)comm;
    *code = SUCCESS;
    return SUCCESS;
}

int ncclGroupStart(void) {
    depth++;
    return SUCCESS;
}

static void message_path(char *path, const struct communicator *c, int to, int from, long number, const char *end) {
    snprintf(path, PATH_MOST, "%s/rank-%d/%d-%ld%s", c->directory, to, from, number, end);
}

static void rest(void) {
    nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
}

static int write_all(int file, const char *data, size_t bytes) {
    while (bytes > 0) {
        ssize_t put = write(file, data, bytes);
        if (put <= 0)
            return SYSTEM_ERROR;
        data += put;
        bytes -= (size_t)put;
    }
    return SUCCESS;
}

/* The other rank's mail box may not be there yet. */
static int send_message(struct call *call) {
    struct communicator *c = call->comm;
    char draft[PATH_MOST], path[PATH_MOST];
    int file = -1;
    message_path(draft, c, call->peer, c->rank, c->sent[call->peer], ".new");
    message_path(path, c, call->peer, c->rank, c->sent[call->peer]++, "");
    for (double waited = 0; file < 0 && waited < PATIENCE_S; waited += 50e-6) {
        file = open(draft, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (file < 0 && errno != ENOENT)
            return SYSTEM_ERROR;
        if (file < 0)
            rest();
    }
    if (file < 0)
        return SYSTEM_ERROR;
    int code = write_all(file, call->from, call->bytes);
    close(file);
    return code == SUCCESS && rename(draft, path) == 0 ? SUCCESS : SYSTEM_ERROR;
}

static int receive_message(struct call *call) {
    struct communicator *c = call->comm;
    char path[PATH_MOST];
    struct stat known;
    int file = -1;
    message_path(path, c, c->rank, call->peer, c->received[call->peer]++, "");
    for (double waited = 0; file < 0 && waited < PATIENCE_S; waited += 50e-6) {
        file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0)
            rest();
    }
    if (file < 0)
        return SYSTEM_ERROR;
    int code = fstat(file, &known) == 0 && (size_t)known.st_size == call->bytes ? SUCCESS : INVALID_USAGE;
    for (size_t got = 0; code == SUCCESS && got < call->bytes;) {
        ssize_t part = read(file, call->to + got, call->bytes - got);
        code = part > 0 ? SUCCESS : SYSTEM_ERROR;
        got += part > 0 ? (size_t)part : 0;
    }
    close(file);
    unlink(path);
    return code;
}

int ncclGroupEnd(void) {
    int code = SUCCESS;
    if (depth < 1)
        return INVALID_USAGE;
    if (--depth > 0)
        return SUCCESS;
    for (int i = 0; i < call_count && code == SUCCESS; i++)
        if (calls[i].from)
            code = send_message(&calls[i]);
    for (int i = 0; i < call_count && code == SUCCESS; i++)
        if (calls[i].to)
            code = receive_message(&calls[i]);
    call_count = 0;
    return code;
}

static int ask(struct call call, int type) {
    if (depth < 1 || call_count == GROUP_MOST) /* alone it would wait for the other side; nobody here asks so */
        return INVALID_USAGE;
    if (type != UINT8 || call.peer < 0 || call.peer >= call.comm->size || call.peer == call.comm->rank)
        return INVALID_ARGUMENT;
    calls[call_count++] = call;
    return SUCCESS;
}

int ncclSend(const void *data, size_t count, int type, int peer, void *comm, void *queue) {
    (void)queue;
    return ask((struct call){.comm = comm, .from = data, .bytes = count, .peer = peer}, type);
}

int ncclRecv(void *data, size_t count, int type, int peer, void *comm, void *queue) {
    (void)queue;
    return ask((struct call){.comm = comm, .to = data, .bytes = count, .peer = peer}, type);
}
