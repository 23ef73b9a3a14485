/* libnvidia-ml.so.1 for tests: answers from a table of "key=value" lines in shared memory ($NVML_STUB_STATE), which
   tests/fakes/nvml.py writes, so that a test changes the machine while a monitor looks at it.

   gpus=2                                   how many there are
   init=18                                  nvmlInit fails with that code
   0.temperature=61                         a value of GPU 0; a key that is not there answers NOT_SUPPORTED
   0.error=15                               every call on GPU 0 fails with that code
   0.error.nvmlDeviceGetPowerUsage=3        that call on GPU 0 fails
   0.hang.nvmlDeviceGetPowerUsage=1         that call does not return while the key is there; 0.hang=1: no call does
   event.<n>=<gpu>:<type>:<data>            delivered once, in the order of n from 0

   Symbols can be left out: cc -DWITHOUT_TEMPERATURE_V … (an old driver). Values are numbers, so memory v2 has its own keys. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (1 << 16)
#define DEVICES 8
#define SLICES 7
typedef unsigned u32;
typedef unsigned long long u64;
typedef struct device { int gpu, slice; } *Dev;
enum { OK, UNINITIALIZED, INVALID, NOT_SUPPORTED, NO_PERMISSION, ALREADY, NOT_FOUND, TOO_SMALL, POWER, NO_DRIVER, TIMED_OUT, VERSION = 25 };
struct state { volatile u64 sequence; char text[SIZE - 8]; };

static struct device devices[DEVICES][SLICES + 1];
static struct state *shared;
static int initialized;
static u64 loaded = ~0ull, delivered;
static char table[SIZE];
static struct { char *key, *value; u32 hash; } rows[1024];
static int count_of_rows;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static u32 hash(const char *s) { u32 h = 2166136261u; while (*s) h = (h ^ (unsigned char)*s++) * 16777619u; return h; }

static void reload(void) { /* under the lock; the writer makes the sequence odd while it writes */
    if (!shared) {
        const char *path = getenv("NVML_STUB_STATE");
        int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        if (fd < 0) return;
        void *at = mmap(0, SIZE, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
        if (at == MAP_FAILED) return;
        shared = at;
    }
    while (loaded != shared->sequence) {
        u64 before = shared->sequence;
        if (before & 1) { usleep(100); continue; }
        memcpy(table, shared->text, sizeof shared->text);
        __sync_synchronize();
        if (shared->sequence != before) continue;
        count_of_rows = 0;
        char *save, *line = strtok_r(table, "\n", &save);
        for (; line && count_of_rows < 1024; line = strtok_r(0, "\n", &save)) {
            char *equals = strchr(line, '=');
            if (!equals) continue;
            *equals = 0;
            rows[count_of_rows].key = line, rows[count_of_rows].value = equals + 1, rows[count_of_rows++].hash = hash(line);
        }
        loaded = before;
    }
}
static int get(const char *key, char *out, size_t n) {
    int found = 0;
    u32 h = hash(key);
    pthread_mutex_lock(&lock);
    reload();
    for (int i = 0; i < count_of_rows; i++)
        if (rows[i].hash == h && !strcmp(rows[i].key, key)) { snprintf(out, n, "%s", rows[i].value); found = 1; break; }
    pthread_mutex_unlock(&lock);
    return found;
}
static int begin(int gpu, const char *function) { /* hang, or the forced error, or OK */
    char key[128], value[64];
    if (!initialized) return UNINITIALIZED;
    for (;; usleep(1000)) {
        snprintf(key, sizeof key, "%d.hang", gpu);
        if (get(key, value, sizeof value)) continue;
        snprintf(key, sizeof key, "%d.hang.%s", gpu, function);
        if (!get(key, value, sizeof value)) break;
    }
    snprintf(key, sizeof key, "%d.error.%s", gpu, function);
    if (get(key, value, sizeof value)) return atoi(value);
    snprintf(key, sizeof key, "%d.error", gpu);
    if (get(key, value, sizeof value)) return atoi(value);
    snprintf(key, sizeof key, "error.%s", function);
    return get(key, value, sizeof value) ? atoi(value) : OK;
}
static void prefix(Dev d, const char *what, char *key, size_t n) {
    if (d->slice) snprintf(key, n, "%d.mig.%d.%s", d->gpu, d->slice - 1, what);
    else snprintf(key, n, "%d.%s", d->gpu, what);
}
static int text(Dev d, const char *function, const char *what, char *out, u32 n) {
    char key[128];
    int error = d ? begin(d->gpu, function) : INVALID;
    if (error) return error;
    prefix(d, what, key, sizeof key);
    return get(key, out, n) ? OK : NOT_SUPPORTED;
}
static int number(Dev d, const char *function, const char *what, u64 *out) {
    char value[64];
    int error = text(d, function, what, value, sizeof value);
    if (!error) *out = value[0] == '-' ? (u64)strtoll(value, 0, 0) : strtoull(value, 0, 0);
    return error;
}
static u32 gpus(void) { char v[16]; return get("gpus", v, sizeof v) ? (u32)atoi(v) : 0; }

int nvmlInitWithFlags(u32 flags) {
    char v[16];
    (void)flags;
    if (get("init", v, sizeof v)) return atoi(v);
    for (int g = 0; g < DEVICES; g++) for (int s = 0; s <= SLICES; s++) devices[g][s].gpu = g, devices[g][s].slice = s;
    initialized++;
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { if (!initialized) return UNINITIALIZED; initialized--; return OK; }
const char *nvmlErrorString(int code) { static __thread char b[32]; snprintf(b, sizeof b, "stub error %d", code); return b; }
int nvmlSystemGetDriverVersion(char *b, u32 n) { int e = begin(-1, __func__); if (!e && !get("driver", b, n)) snprintf(b, n, "615.71"); return e; }
int nvmlDeviceGetCount_v2(u32 *n) { *n = gpus(); return begin(-1, __func__); }
int nvmlDeviceGetHandleByIndex_v2(u32 i, Dev *d) { if (i >= gpus()) return INVALID; *d = &devices[i][0]; return begin((int)i, __func__); }
int nvmlDeviceGetUUID(Dev d, char *b, u32 n) { return text(d, __func__, "uuid", b, n); }
int nvmlDeviceGetName(Dev d, char *b, u32 n) { return text(d, __func__, "name", b, n); }

#define U32(function, what) int function(Dev d, u32 *o) { u64 v = 0; int e = number(d, __func__, what, &v); if (!e) *o = (u32)v; return e; }
#define U64(function, what) int function(Dev d, u64 *o) { return number(d, __func__, what, o); }
U32(nvmlDeviceGetPowerUsage, "power_mw")
U32(nvmlDeviceGetEnforcedPowerLimit, "power_limit_mw")
U32(nvmlDeviceGetPcieReplayCounter, "pcie.replays")
U32(nvmlDeviceGetCurrPcieLinkGeneration, "pcie.generation")
U32(nvmlDeviceGetCurrPcieLinkWidth, "pcie.width")
U32(nvmlDeviceGetMaxPcieLinkGeneration, "pcie.generation_max")
U32(nvmlDeviceGetMaxPcieLinkWidth, "pcie.width_max")
U32(nvmlDeviceGetNumFans, "fans")
U32(nvmlDeviceGetPerformanceState, "pstate")
U32(nvmlDeviceGetPowerState, "pstate")
U64(nvmlDeviceGetTotalEnergyConsumption, "energy_mj")
U64(nvmlDeviceGetCurrentClocksThrottleReasons, "reasons")
U64(nvmlDeviceGetSupportedEventTypes, "events")
#ifndef WITHOUT_EVENT_REASONS
U64(nvmlDeviceGetCurrentClocksEventReasons, "reasons")
#endif
int nvmlDeviceGetFanSpeed_v2(Dev d, u32 fan, u32 *o) { char k[32]; u64 v = 0; snprintf(k, sizeof k, "fan.%u", fan); int e = number(d, __func__, k, &v); *o = (u32)v; return e; }
int nvmlDeviceGetTemperature(Dev d, int sensor, u32 *o) { u64 v = 0; int e = number(d, __func__, "temperature", &v); (void)sensor; *o = (u32)v; return e; }
#ifndef WITHOUT_TEMPERATURE_V
struct temperature { u32 version; int sensor, value; };
int nvmlDeviceGetTemperatureV(Dev d, struct temperature *t) { u64 v = 0; int e = t->version == 0x100000C ? number(d, __func__, "temperature", &v) : VERSION; t->value = (int)v; return e; }
#endif
struct margin { u32 version; int value; };
int nvmlDeviceGetMarginTemperature(Dev d, struct margin *m) { u64 v = 0; int e = m->version == 0x1000008 ? number(d, __func__, "margin", &v) : VERSION; m->value = (int)v; return e; }
int nvmlDeviceGetTemperatureThreshold(Dev d, int which, u32 *o) { char k[32]; u64 v = 0; snprintf(k, sizeof k, "threshold.%d", which); int e = number(d, __func__, k, &v); *o = (u32)v; return e; }
int nvmlDeviceGetClockInfo(Dev d, int type, u32 *o) { char k[32]; u64 v = 0; snprintf(k, sizeof k, "clock.%d", type); int e = number(d, __func__, k, &v); *o = (u32)v; return e; }
int nvmlDeviceGetMaxClockInfo(Dev d, int type, u32 *o) { char k[32]; u64 v = 0; snprintf(k, sizeof k, "clock_max.%d", type); int e = number(d, __func__, k, &v); *o = (u32)v; return e; }
struct utilization { u32 gpu, memory; };
int nvmlDeviceGetUtilizationRates(Dev d, struct utilization *u) { u64 v = 0; int e = number(d, __func__, "utilization", &v); if (!e) { u->gpu = (u32)v; v = 0; number(d, "", "utilization_memory", &v); u->memory = (u32)v; } return e; }
struct memory1 { u64 total, free, used; };
struct memory2 { u32 version; u64 total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo(Dev d, struct memory1 *m) { int e = number(d, __func__, "memory.total", &m->total); if (!e) { m->used = 0; number(d, "", "memory.used", &m->used); m->free = m->total - m->used; } return e; }
#ifndef WITHOUT_MEMORY_V2
int nvmlDeviceGetMemoryInfo_v2(Dev d, struct memory2 *m) {
    int e = m->version == 0x02000028 ? number(d, __func__, "memory.total", &m->total) : VERSION;
    if (e) return e;
    m->used = m->reserved = 0;
    number(d, "", "memory.used", &m->used), number(d, "", "memory.reserved", &m->reserved);
    m->free = m->total - m->used - m->reserved;
    return OK;
}
#endif
int nvmlDeviceGetTotalEccErrors(Dev d, int type, int counter, u64 *o) { (void)counter; return number(d, __func__, type ? "ecc.uncorrected" : "ecc.corrected", o); }
int nvmlDeviceGetRemappedRows(Dev d, u32 *c, u32 *u, u32 *p, u32 *f) {
    u64 v = 0;
    int e = number(d, __func__, "rows.corrected", &v);
    if (e) return e;
    *c = (u32)v, v = 0, number(d, "", "rows.uncorrected", &v);
    *u = (u32)v, v = 0, number(d, "", "rows.pending", &v);
    *p = (u32)v, v = 0, number(d, "", "rows.failed", &v);
    *f = (u32)v;
    return OK;
}
struct process { u32 pid; u64 memory; u32 gpu_instance, compute_instance; };
static int processes(Dev d, const char *function, u32 *n, struct process *out) { /* 0.processes=pid:bytes[:gi:ci],… */
    char list[1024], *save = 0;
    u32 found = 0, room = out ? *n : 0;
    int e = text(d, function, "processes", list, sizeof list);
    if (e == NOT_SUPPORTED) e = OK, list[0] = 0;
    if (e) return e;
    for (char *p = strtok_r(list, ",", &save); p; p = strtok_r(0, ",", &save), found++) {
        u32 pid = 0, gi = ~0u, ci = ~0u;
        u64 bytes = ~0ull;
        sscanf(p, "%u:%llu:%u:%u", &pid, &bytes, &gi, &ci);
        if (found < room) out[found] = (struct process){pid, bytes, gi, ci};
    }
    *n = found;
    return found > room ? TOO_SMALL : OK;
}
#ifndef WITHOUT_PROCESSES_V3
int nvmlDeviceGetComputeRunningProcesses_v3(Dev d, u32 *n, struct process *p) { return processes(d, __func__, n, p); }
#endif
int nvmlDeviceGetComputeRunningProcesses_v2(Dev d, u32 *n, struct process *p) { return processes(d, __func__, n, p); }
int nvmlDeviceGetMigMode(Dev d, u32 *current, u32 *pending) { u64 v = 0; int e = number(d, __func__, "mig", &v); *current = *pending = v != 0; return e; }
int nvmlDeviceGetMaxMigDeviceCount(Dev d, u32 *n) { u64 v = 0; int e = number(d, __func__, "mig", &v); *n = (u32)v; return e; }
int nvmlDeviceGetMigDeviceHandleByIndex(Dev d, u32 i, Dev *o) {
    char b[96];
    int e = begin(d->gpu, __func__);
    if (e) return e;
    if (i >= SLICES) return INVALID;
    *o = &devices[d->gpu][i + 1];
    return text(*o, "", "uuid", b, sizeof b) ? NOT_FOUND : OK;
}
struct field { u32 id, scope; int64_t time, latency; u32 type; int code; union { double d; u64 u; } value; };
int nvmlDeviceGetFieldValues(Dev d, int n, struct field *f) {
    int e = d ? begin(d->gpu, __func__) : INVALID;
    for (int i = 0; !e && i < n; i++) {
        char k[32], field_function[48];
        u64 v = 0;
        snprintf(k, sizeof k, "field.%u", f[i].id), snprintf(field_function, sizeof field_function, "field.%u", f[i].id);
        f[i].code = number(d, field_function, k, &v), f[i].type = 3, f[i].value.u = v;
    }
    return e;
}
struct event { Dev device; u64 type, data; u32 gpu_instance, compute_instance; };
int nvmlEventSetCreate(void **set) { *set = malloc(1); return begin(-1, __func__); }
int nvmlEventSetFree(void *set) { free(set); return OK; }
int nvmlDeviceRegisterEvents(Dev d, u64 types, void *set) { (void)types, (void)set; return begin(d->gpu, __func__); }
int nvmlEventSetWait_v2(void *set, struct event *e, u32 ms) {
    (void)set;
    for (u32 waited = 0;; waited += 20) {
        char key[32], value[96];
        int error = begin(-1, __func__), gpu;
        if (error) return error;
        snprintf(key, sizeof key, "event.%llu", delivered);
        if (get(key, value, sizeof value) && sscanf(value, "%d:%llu:%llu", &gpu, &e->type, &e->data) == 3) {
            delivered++;
            e->device = &devices[gpu][0], e->gpu_instance = e->compute_instance = ~0u;
            return OK;
        }
        if (waited >= ms) return TIMED_OUT;
        usleep(20000);
    }
}
