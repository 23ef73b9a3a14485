/* A libcuda.so.1 for tests: one device whose memory is the host's, streams that run at once, graphs that record and replay.
 *
 * Failures come from the file named by CUDA_STUB_FAILURES, read at every call: lines "function=code" (every call from now on) or
 * "function=code@n" (the n-th call since the file changed). A code that is sticky on a real device is sticky here: afterwards every
 * call that touches the device answers with it. Counters of what is alive or was done are read with stub_count. Not for threads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef unsigned long long Pointer;
typedef int (*Kernel)(long);

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, CAPTURE_INVALIDATED = 901 };
enum { TOTAL_BYTES = 1 << 30, NAMES = 64, BLOCKS = 4096, NODES = 256 };

/* ------------------------------------------------------------------------------------------------ counters and failures */

static struct { char name[48]; long value; } counters[NAMES];

static long *counter(const char *name) {
    for (int i = 0; i < NAMES; i++) {
        if (!counters[i].name[0]) snprintf(counters[i].name, sizeof counters[i].name, "%s", name);
        if (!strcmp(counters[i].name, name)) return &counters[i].value;
    }
    abort();
}

long stub_count(const char *name) { return *counter(name); }

static char rules[1024], rules_before[1024];
static int lost;

static int sticky(int code) {
    return code == 214 || code == 226 || code == 700 || code == 702 || (code >= 709 && code <= 710) ||
           (code >= 714 && code <= 719) || code == 721 || code == 999;
}

/* Whether a call fails now, and with what. `device`: it touches the device, so a lost one answers it. */
static int failing(const char *function, int device) {
    const char *path = getenv("CUDA_STUB_FAILURES");
    char calls[64];
    if (device && lost) return lost;
    rules[0] = 0;
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) {
        rules[fread(rules, 1, sizeof rules - 1, file)] = 0;
        fclose(file);
    }
    if (strcmp(rules, rules_before)) {
        memcpy(rules_before, rules, sizeof rules);
        for (int i = 0; i < NAMES; i++)
            if (!strncmp(counters[i].name, "calls ", 6)) counters[i].value = 0;
    }
    for (char *line = rules; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        char named[48];
        int code = 0, nth = 0;
        int found = sscanf(line, "%47[^=]=%d@%d", named, &code, &nth);
        if (found < 2 || strcmp(named, function)) continue;
        snprintf(calls, sizeof calls, "calls %.40s", function);
        long call = ++*counter(calls);
        if (found == 3 && call != nth) continue;
        if (sticky(code)) lost = code;
        return code;
    }
    return SUCCESS;
}

#define MAY_FAIL(device)                          \
    do {                                          \
        int code_ = failing(__func__, device);    \
        if (code_) return code_;                  \
    } while (0)

/* ----------------------------------------------------------------------------------------------------- device and context */

/* A line "key=text" of the file named by CUDA_STUB_DEVICE: what is not said there is as given. */
static void described(const char *key, char *text, int size, const char *otherwise) {
    const char *path = getenv("CUDA_STUB_DEVICE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256];
    size_t length = strlen(key);
    snprintf(text, size, "%s", otherwise);
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, key, length) && line[length] == '=') {
            line[strcspn(line, "\n")] = 0;
            snprintf(text, size, "%s", line + length + 1);
        }
    if (file) fclose(file);
}

Result cuInit(unsigned flags) { MAY_FAIL(0); return flags ? INVALID_VALUE : SUCCESS; }
Result cuDriverGetVersion(int *version) {
    char text[32];
    described("cuda", text, sizeof text, "13040");
    *version = atoi(text);
    return SUCCESS;
}

Result cuDeviceGetCount(int *count) { MAY_FAIL(0); *count = 1; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : SUCCESS; }
Result cuDeviceGetName(char *name, int size, int device) { described("name", name, size, "Stub GPU"); return device; }
Result cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = TOTAL_BYTES; return device; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : attribute == 16 ? 24 : 0;
    return device;
}

Result cuDevicePrimaryCtxRetain(void **context, int device) {
    MAY_FAIL(1);
    ++*counter("contexts");
    *context = counters;
    return device;
}

Result cuDevicePrimaryCtxRelease_v2(int device) { --*counter("contexts"); return device; }
Result cuCtxSetCurrent(void *context) { return context == counters ? SUCCESS : 201; }
Result cuCtxGetCurrent(void **context) { *context = counters; return SUCCESS; }

Result cuGetErrorName(int code, const char **name) { *name = code ? "CUDA_ERROR" : "CUDA_SUCCESS"; return SUCCESS; }
Result cuGetErrorString(int code, const char **text) { *text = code ? "a failure of the stub" : "no error"; return SUCCESS; }

/* ----------------------------------------------------------------------------------------------------------------- memory */

static struct { void *address; size_t nbytes; const char *kind; } blocks[BLOCKS];

static Result take(void *address, size_t nbytes, const char *kind) {
    for (int i = 0; i < BLOCKS; i++)
        if (!blocks[i].address) {
            blocks[i].address = address;
            blocks[i].nbytes = nbytes;
            blocks[i].kind = kind;
            *counter(kind) += (long)nbytes;
            return SUCCESS;
        }
    abort();
}

static Result give(void *address, const char *kind) {
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].address == address && blocks[i].kind == kind) {
            *counter(kind) -= (long)blocks[i].nbytes;
            blocks[i].address = NULL;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

static const char DEVICE[] = "device_bytes", PINNED[] = "pinned_bytes", REGISTERED[] = "registered_bytes";

int stub_lost(void) { return lost; }

/* A new process, as far as the tests are concerned. */
void stub_reset(void) {
    memset(counters, 0, sizeof counters);
    memset(blocks, 0, sizeof blocks);
    rules_before[0] = 0;
    lost = 0;
}

/* Whether a range lies within one block of device memory: a bogus pointer is an error here, not a crash of the tests. */
static int on_device(Pointer start, size_t nbytes) {
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].address && blocks[i].kind == DEVICE && start >= (Pointer)blocks[i].address &&
            start + nbytes <= (Pointer)blocks[i].address + blocks[i].nbytes)
            return 1;
    return 0;
}

Result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    MAY_FAIL(1);
    *total = TOTAL_BYTES;
    *free_bytes = TOTAL_BYTES - *counter(DEVICE);
    return SUCCESS;
}

Result cuMemAlloc_v2(Pointer *address, size_t nbytes) {
    MAY_FAIL(1);
    if (nbytes > (size_t)(TOTAL_BYTES - *counter(DEVICE))) return OUT_OF_MEMORY;
    void *block = aligned_alloc(256, (nbytes + 255) & ~(size_t)255);
    memset(block, 0xA5, nbytes);
    *address = (Pointer)block;
    return take(block, nbytes, DEVICE);
}

Result cuMemFree_v2(Pointer address) {
    MAY_FAIL(1);
    Result result = give((void *)address, DEVICE);
    if (!result) free((void *)address);
    return result;
}

Result cuMemHostAlloc(void **address, size_t nbytes, unsigned flags) {
    MAY_FAIL(1);
    *address = malloc(nbytes);
    return flags ? INVALID_VALUE : take(*address, nbytes, PINNED);
}

Result cuMemFreeHost(void *address) {
    MAY_FAIL(1);
    Result result = give(address, PINNED);
    if (!result) free(address);
    return result;
}

Result cuMemHostRegister_v2(void *address, size_t nbytes, unsigned flags) {
    MAY_FAIL(1);
    return flags ? INVALID_VALUE : take(address, nbytes, REGISTERED);
}

Result cuMemHostUnregister(void *address) { MAY_FAIL(1); return give(address, REGISTERED); }

/* ----------------------------------------------------------------------------------------------------- streams and graphs */

typedef struct { Kernel kernel; long argument; void *target; const void *source; size_t nbytes; } Node;
typedef struct { int count; Node nodes[NODES]; } Graph;
typedef struct { Graph *capturing; } Stream;

Result cuStreamCreate(Stream **stream, unsigned flags) {
    MAY_FAIL(1);
    (void)flags;
    *stream = calloc(1, sizeof(Stream));
    ++*counter("streams");
    return SUCCESS;
}

Result cuStreamDestroy_v2(Stream *stream) { MAY_FAIL(1); free(stream); --*counter("streams"); return SUCCESS; }

Result cuStreamSynchronize(Stream *stream) {
    MAY_FAIL(1);
    ++*counter("synchronizations");
    return stream->capturing ? 900 : SUCCESS;
}

static Result perform(Node node) {
    if (!node.kernel) {
        memcpy(node.target, node.source, node.nbytes);
        return SUCCESS;
    }
    int code = node.kernel(node.argument);
    if (code && sticky(code)) lost = code;
    return SUCCESS;
}

static Result queue(Stream *stream, Node node) {
    if (!stream->capturing) return perform(node);
    if (stream->capturing->count == NODES) abort();
    stream->capturing->nodes[stream->capturing->count++] = node;
    return SUCCESS;
}

/* What a library does with a compiled kernel: queue a function of its own. Its result, if it is a sticky code, shows later. */
Result stub_launch(Stream *stream, Kernel kernel, long argument) {
    MAY_FAIL(1);
    ++*counter("launches");
    return queue(stream, (Node){kernel, argument, NULL, NULL, 0});
}

int stub_capturing(Stream *stream) { return stream->capturing != NULL; }

Result cuMemcpyHtoDAsync_v2(Pointer device, const void *host, size_t nbytes, Stream *stream) {
    MAY_FAIL(1);
    ++*counter("copies");
    return on_device(device, nbytes) ? queue(stream, (Node){NULL, 0, (void *)device, host, nbytes}) : INVALID_VALUE;
}

Result cuMemcpyDtoHAsync_v2(void *host, Pointer device, size_t nbytes, Stream *stream) {
    MAY_FAIL(1);
    ++*counter("copies");
    return on_device(device, nbytes) ? queue(stream, (Node){NULL, 0, host, (void *)device, nbytes}) : INVALID_VALUE;
}

Result cuStreamBeginCapture_v2(Stream *stream, int mode) {
    MAY_FAIL(1);
    (void)mode;
    stream->capturing = calloc(1, sizeof(Graph));
    ++*counter("graphs");
    return SUCCESS;
}

Result cuStreamEndCapture(Stream *stream, Graph **graph) {
    Graph *made = stream->capturing;
    stream->capturing = NULL;
    *graph = NULL;
    int code = failing(__func__, 1);
    if (!code && made && !made->count) code = CAPTURE_INVALIDATED;
    if (code || !made) {
        free(made);
        if (made) --*counter("graphs");
        return code ? code : 903;
    }
    *graph = made;
    return SUCCESS;
}

Result cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long flags) {
    MAY_FAIL(1);
    (void)flags;
    *executable = malloc(sizeof(Graph));
    memcpy(*executable, graph, sizeof(Graph));
    ++*counter("executables");
    ++*counter("captures");
    return SUCCESS;
}

Result cuGraphDestroy(Graph *graph) { free(graph); --*counter("graphs"); return SUCCESS; }
Result cuGraphExecDestroy(Graph *executable) { MAY_FAIL(1); free(executable); --*counter("executables"); return SUCCESS; }

Result cuGraphLaunch(Graph *executable, Stream *stream) {
    MAY_FAIL(1);
    ++*counter("graph_launches");
    for (int i = 0; i < executable->count; i++) {
        Result result = queue(stream, executable->nodes[i]);
        if (result) return result;
    }
    return SUCCESS;
}

/* -------------------------------------------------------------------------------------------- how the binding finds them */

Result cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    static const char *const suffixes[] = {"_v2", "WithFlags", ""};
    void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
    char wanted[128];
    (void)version;
    (void)flags;
    *function = NULL;
    for (int i = 0; self && i < 3 && !*function; i++) {
        snprintf(wanted, sizeof wanted, "%s%s", name, suffixes[i]);
        *function = dlsym(self, wanted);
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

Result cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
