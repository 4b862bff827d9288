/* A FAKE libcuda for tests of the ctypes calls: argument types, error words, memory round trips.
   Device memory is host memory; everything happens at once.  FAKE_CUDA=init:<n>, count:<n> or
   devices:<n> chooses what goes wrong. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int option(const char *name, int otherwise) {
    const char *given = getenv("FAKE_CUDA");
    size_t n = strlen(name);
    return given && !strncmp(given, name, n) && given[n] == ':' ? atoi(given + n + 1) : otherwise;
}

int cuInit(unsigned flags) { return flags ? 1 : option("init", 0); }
int cuDriverGetVersion(int *to) { *to = 12040; return 0; }
int cuDeviceGetCount(int *to) { *to = option("devices", 2); return option("count", 0); }
int cuDeviceGet(int *to, int index) { *to = 10 + index; return 0; }
int cuDeviceGetName(char *to, int size, int device) {
    snprintf(to, size, "FAKE GPU %d", device);
    return 0;
}
int cuDeviceGetAttribute(int *to, int which, int device) {
    *to = device < 10 ? -1 : which == 75 ? 9 : 0;
    return 0;
}
int cuDeviceTotalMem_v2(size_t *to, int device) { *to = (size_t)80 << 30; return 0; }
int cuGetErrorName(int error, const char **to) {
    *to = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 100 ? "CUDA_ERROR_NO_DEVICE" : NULL;
    return *to ? 0 : 1;
}
int cuGetErrorString(int error, const char **to) { *to = "words of the fake"; return 0; }

static int stack;
int cuDevicePrimaryCtxRetain(void **to, int device) { *to = &stack; return device < 10 ? 101 : 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device < 10 ? 101 : stack ? 201 : 0; }
int cuCtxPushCurrent_v2(void *context) { return context == &stack ? stack++ < 0 : 201; }
int cuCtxPopCurrent_v2(void **to) { *to = &stack; return --stack < 0 ? 201 : 0; }
int cuMemGetInfo_v2(size_t *free_, size_t *total) {
    *free_ = (size_t)79 << 30;
    *total = (size_t)80 << 30;
    return stack > 0 ? 0 : 201;
}
int cuMemAlloc_v2(uint64_t *to, size_t n) {
    if (n > (size_t)1 << 30) return 2;
    *to = (uint64_t)(uintptr_t)malloc(n);
    return 0;
}
int cuMemFree_v2(uint64_t at) { free((void *)(uintptr_t)at); return 0; }
int cuMemAllocHost_v2(void **to, size_t n) { *to = malloc(n); return 0; }
int cuMemFreeHost(void *at) { free(at); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) {
    memcpy((void *)(uintptr_t)to, from, n);
    return stream ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream) {
    memcpy(to, (void *)(uintptr_t)from, n);
    return stream ? 0 : 400;
}
int cuMemsetD32Async(uint64_t to, unsigned word, size_t n, void *stream) {
    for (size_t i = 0; i < n; i++) ((uint32_t *)(uintptr_t)to)[i] = word;
    return stream ? 0 : 400;
}
int cuStreamCreate(void **to, unsigned flags) { *to = malloc(1); return flags == 1 ? 0 : 1; }
int cuStreamDestroy_v2(void *stream) { free(stream); return 0; }
int cuStreamSynchronize(void *stream) { return stream ? 0 : 400; }
int cuEventCreate(void **to, unsigned flags) { *to = malloc(1); return 0; }
int cuEventRecord(void *event, void *stream) { return event && stream ? 0 : 400; }
int cuEventSynchronize(void *event) { return event ? 0 : 400; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return flags ? 1 : 0; }
int cuEventElapsedTime(float *to, void *first, void *second) { *to = 1.5f; return 0; }
int cuEventDestroy_v2(void *event) { free(event); return 0; }
