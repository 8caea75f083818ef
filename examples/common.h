/* What the host programs share. */
#ifndef COMMON_H
#define COMMON_H

#include <softsgx_host.h>
#include <time.h>

static double seconds(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Numbers that look random and are the same every time. */
static inline uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Load the enclave or end. */
static void must_load(struct sgx_enclave *enclave, const char *path)
{
    if (sgx_load(enclave, path)) {
        fprintf(stderr, "%s\n", enclave->problem);
        exit(1);
    }
}

/* Call the first thread, or end; an enclave that answers less than 0 has refused. */
static long must_call(struct sgx_enclave *enclave, unsigned long function, void *argument,
                      size_t size)
{
    long result;

    if (sgx_call(enclave, 0, function, argument, size, &result)) {
        fprintf(stderr, "%s\n", enclave->problem);
        exit(1);
    }
    if (result < 0) {
        fprintf(stderr, "function %lu refused: build with a larger --heap, or ask for less\n",
                function);
        exit(1);
    }
    return result;
}

/* The number in argv[at], or `otherwise`. */
static uint64_t number(int argc, char **argv, int at, uint64_t otherwise)
{
    return argc > at ? strtoull(argv[at], NULL, 10) : otherwise;
}

#endif
