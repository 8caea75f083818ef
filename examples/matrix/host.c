/* matrix ENCLAVE [ORDER]: multiply two matrices of ORDER x ORDER inside, and check the product.
 *
 * C = A x B holds, but for a small chance, when C x v = A x (B x v) for a random v: the enclave
 * gives the left side, the host computes the right one from the same seed. */

#include "../common.h"
#include "matrix.h"

enum { SEED = 2026 };

static void apply(uint32_t name, uint32_t order, const uint32_t *vector, uint32_t *answer)
{
    for (uint32_t i = 0; i < order; i++) {
        answer[i] = 0;
        for (uint32_t j = 0; j < order; j++)
            answer[i] += cell(SEED, name, i, j) * vector[j];
    }
}

int main(int argc, char **argv)
{
    static struct sgx_enclave enclave;
    uint64_t order = number(argc, argv, 2, 1024);
    uint32_t checksum = 0;

    if (argc < 2 || !order || order > MAX_ORDER) {
        fprintf(stderr, "usage: matrix ENCLAVE [ORDER, 1 to %d]\n", MAX_ORDER);
        return 2;
    }
    must_load(&enclave, argv[1]);
    uint32_t *v = calloc(4 * order, sizeof(*v));
    if (!v)
        return 1;
    uint32_t *got = v + order, *middle = got + order, *wanted = middle + order;
    struct request request = {(uint32_t)order, SEED, v, got};
    for (uint32_t i = 0; i < order; i++)
        v[i] = cell(SEED, 'v', i, 0);

    must_call(&enclave, MAKE, &request, sizeof(request));
    double start = seconds();
    must_call(&enclave, MULTIPLY, &request, sizeof(request));
    double taken = seconds() - start;
    must_call(&enclave, APPLY, &request, sizeof(request));
    sgx_unload(&enclave);

    apply('B', request.order, v, middle);
    apply('A', request.order, middle, wanted);
    for (uint32_t i = 0; i < order; i++) {
        checksum = checksum * 31 + got[i];
        if (got[i] != wanted[i]) {
            fprintf(stderr, "matrix: row %u of the product is wrong\n", i);
            return 1;
        }
    }
    printf("matrix: %u x %u, product verified, checksum %08x, %.2f s\n", request.order,
           request.order, checksum, taken);
    return 0;
}
