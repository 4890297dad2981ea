/* A stand-in for libnvidia-ml.so.1: the symbols the NVML adapter uses, over state in a file shared by processes.
 *
 * NVML_STUB_STATE names the file; its layout is `struct state`, mirrored by nvml_stub.py. Faults are written into it by
 * tests: `init_error`, and for each GPU the code that reads and writes answer with. Built without WITH_LOCKED_CLOCKS it
 * is the library of a driver too old to lock clocks. Asserts nothing, prints nothing. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, UNKNOWN = 999 };
enum { MAX_GPUS = 16, MIN_MHZ = 345, MAX_MHZ = 1980, STEP_MHZ = 15, MEMORY_MHZ = 2619 };

struct gpu {
    uint32_t low_mhz, high_mhz; /* 0, 0: default clocks */
    uint32_t read_error, write_error;
    uint32_t mig, power_mw, temperature_c, writes;
    uint64_t energy_mj, reasons;
};
struct state {
    uint32_t count, init_error;
    struct gpu gpus[MAX_GPUS];
};

static struct state *state;

int nvmlInitWithFlags(unsigned flags) {
    const char *path = getenv("NVML_STUB_STATE");
    int file = path ? open(path, O_RDWR) : -1;
    (void)flags;
    if (file < 0) return UNKNOWN;
    if (state) munmap(state, sizeof *state);
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return state == MAP_FAILED ? UNKNOWN : (int)state->init_error;
}
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the stub"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = state->count; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct gpu **device) {
    if (index >= state->count) return INVALID_ARGUMENT;
    *device = &state->gpus[index];
    return SUCCESS;
}
static void text(char *out, unsigned size, const char *prefix, struct gpu *g) {
    unsigned end = (unsigned)strlen(prefix);
    memcpy(out, prefix, end < size ? end : size);
    out[end] = (char)('a' + (g - state->gpus));
    out[end + 1] = 0;
}
int nvmlDeviceGetUUID(struct gpu *g, char *out, unsigned size) { text(out, size, "GPU-stub-", g); return SUCCESS; }
int nvmlDeviceGetName(struct gpu *g, char *out, unsigned size) { text(out, size, "NVIDIA Stub ", g); return SUCCESS; }

#define READ(g, out, value) do { if ((g)->read_error) return (int)(g)->read_error; *(out) = (value); } while (0)
int nvmlDeviceGetSupportedMemoryClocks(struct gpu *g, unsigned *count, unsigned *clocks) {
    unsigned room = *count;
    READ(g, count, 1);
    if (room < 1 || !clocks) return INSUFFICIENT_SIZE;
    clocks[0] = MEMORY_MHZ;
    return SUCCESS;
}
int nvmlDeviceGetSupportedGraphicsClocks(struct gpu *g, unsigned memory, unsigned *count, unsigned *clocks) {
    unsigned room = *count, total = (MAX_MHZ - MIN_MHZ) / STEP_MHZ + 1;
    if (memory != MEMORY_MHZ) return INVALID_ARGUMENT;
    READ(g, count, total);
    if (room < total || !clocks) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < total; i++) clocks[i] = MAX_MHZ - i * STEP_MHZ; /* descending, as the real one */
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(struct gpu *g, int type, unsigned *mhz) {
    (void)type;
    READ(g, mhz, g->high_mhz ? g->high_mhz : MAX_MHZ);
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(struct gpu *g, unsigned *mw) { READ(g, mw, g->power_mw); return SUCCESS; }
int nvmlDeviceGetTemperature(struct gpu *g, int sensor, unsigned *c) {
    (void)sensor;
    READ(g, c, g->temperature_c);
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(struct gpu *g, unsigned long long *mj) {
    if (g->mig) return NOT_SUPPORTED;
    READ(g, mj, g->energy_mj);
    return SUCCESS;
}
int nvmlDeviceGetCurrentClocksEventReasons(struct gpu *g, unsigned long long *mask) {
    READ(g, mask, g->reasons);
    return SUCCESS;
}
int nvmlDeviceGetMigMode(struct gpu *g, unsigned *current, unsigned *pending) {
    *current = *pending = g->mig;
    return SUCCESS;
}
#ifdef WITH_LOCKED_CLOCKS
int nvmlDeviceSetGpuLockedClocks(struct gpu *g, unsigned low, unsigned high) {
    if (g->write_error) return (int)g->write_error;
    if (low > high || high > MAX_MHZ) return INVALID_ARGUMENT;
    g->low_mhz = low;
    g->high_mhz = high;
    g->writes++;
    return SUCCESS;
}
int nvmlDeviceResetGpuLockedClocks(struct gpu *g) {
    if (g->write_error) return (int)g->write_error;
    g->low_mhz = g->high_mhz = 0;
    g->writes++;
    return SUCCESS;
}
#endif
