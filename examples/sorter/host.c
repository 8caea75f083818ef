/* sorter ENCLAVE [KEYS]: sort KEYS numbers of 64 bits inside, and check what comes out.
 *
 * What comes out must rise, and be what went in: two sums over all keys, one of them of scrambled
 * keys, must agree. */

#include "../common.h"
#include "sorter.h"

enum { PIECE = 8192 };

struct sums {
    uint64_t plain, scrambled;
};

static void count_in(struct sums *sums, uint64_t key)
{
    sums->plain += key;
    sums->scrambled += mix(key ^ 0x5eed);
}

int main(int argc, char **argv)
{
    static struct sgx_enclave enclave;
    static uint64_t piece[PIECE];
    uint64_t total = number(argc, argv, 2, 1500000), last = 0, at;
    struct sums in = {0, 0}, out = {0, 0};
    struct request request = {0, total, piece};

    if (argc < 2 || !total) {
        fprintf(stderr, "usage: sorter ENCLAVE [KEYS]\n");
        return 2;
    }
    must_load(&enclave, argv[1]);
    must_call(&enclave, OPEN, &request, sizeof(request));
    for (at = 0; at < total; at += request.count) {
        request.first = at;
        request.count = total - at < PIECE ? total - at : PIECE;
        for (uint64_t i = 0; i < request.count; i++)
            count_in(&in, piece[i] = mix(at + i + 1));
        must_call(&enclave, PUT, &request, sizeof(request));
    }

    double start = seconds();
    must_call(&enclave, SORT, &request, sizeof(request));
    double taken = seconds() - start;

    for (at = 0; at < total; at += request.count) {
        request.first = at;
        request.count = total - at < PIECE ? total - at : PIECE;
        must_call(&enclave, GET, &request, sizeof(request));
        for (uint64_t i = 0; i < request.count; i++) {
            if (piece[i] < last) {
                fprintf(stderr, "sorter: key %llu is out of order\n", (unsigned long long)(at + i));
                return 1;
            }
            count_in(&out, last = piece[i]);
        }
    }
    sgx_unload(&enclave);
    if (in.plain != out.plain || in.scrambled != out.scrambled) {
        fprintf(stderr, "sorter: other keys came out than went in\n");
        return 1;
    }
    printf("sorter: %llu keys, order verified, checksum %016llx, %.2f s\n",
           (unsigned long long)total, (unsigned long long)out.scrambled, taken);
    return 0;
}
