/* matrix ENCLAVE [ORDER]: multiply two matrices of ORDER x ORDER inside, and check the product.
 *
 * C = A x B holds, but for one chance in 2^32, when C x v = A x (B x v) for a random v: the
 * enclave gives the left side, the host computes the right one from the same seed. */

#include <softsgx_host.h>
#include <time.h>

#include "matrix.h"

enum { SEED = 2026 };

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void apply(uint32_t name, uint32_t order, const uint32_t *vector, uint32_t *answer)
{
    for (uint32_t i = 0; i < order; i++) {
        answer[i] = 0;
        for (uint32_t j = 0; j < order; j++)
            answer[i] += cell(SEED, name, i, j) * vector[j];
    }
}

static void call(struct sgx_enclave *enclave, unsigned long function, struct request *request)
{
    long result;

    if (sgx_call(enclave, 0, function, request, sizeof(*request), &result)) {
        fprintf(stderr, "matrix: %s\n", enclave->problem);
        exit(1);
    }
    if (result) {
        fprintf(stderr, "matrix: function %lu refused; is the heap too small?\n", function);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    static struct sgx_enclave enclave;
    uint32_t order = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 1024, checksum = 0;

    if (argc < 2 || !order || order > MAX_ORDER) {
        fprintf(stderr, "usage: matrix ENCLAVE [ORDER, at most %d]\n", MAX_ORDER);
        return 2;
    }
    if (sgx_load(&enclave, argv[1])) {
        fprintf(stderr, "matrix: %s\n", enclave.problem);
        return 1;
    }
    uint32_t *v = calloc(4 * order, sizeof(*v));
    uint32_t *got = v + order, *middle = got + order, *wanted = middle + order;
    struct request request = {order, SEED, v, got};
    if (!v)
        return 1;
    for (uint32_t i = 0; i < order; i++)
        v[i] = cell(SEED, 'v', i, 0);

    call(&enclave, MAKE, &request);
    double start = now();
    call(&enclave, MULTIPLY, &request);
    double seconds = now() - start;
    call(&enclave, APPLY, &request);
    sgx_unload(&enclave);

    apply('B', order, v, middle);
    apply('A', order, middle, wanted);
    for (uint32_t i = 0; i < order; i++) {
        checksum = checksum * 31 + got[i];
        if (got[i] != wanted[i]) {
            fprintf(stderr, "matrix: row %u of the product is wrong\n", i);
            return 1;
        }
    }
    printf("matrix: %u x %u, product verified, checksum %08x, %.2f s\n", order, order, checksum,
           seconds);
    return 0;
}
