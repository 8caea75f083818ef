/* pages add PAGES KIND SLICES: seconds of one ADD_PAGES of so many pages, for each slice; KIND is
 *     0 for zeros, 1 for other bytes, 2 for other bytes that are measured
 * pages grow ENCLAVE PAGES SLICES: for each slice, seconds of accepting and touching so many new
 *     pages one after the other, and of trimming, accepting and removing them in ranges
 * pages grow-all ENCLAVE PAGES SLICES: the same, but all are accepted before one is touched */

#include <softsgx_host.h>
#include <time.h>

#include "work.h"

enum { DEBUG_MODE64 = 6, X87_SSE = 3, REGULAR = 2, TRIM = 4, READ_WRITE = 3 };

struct modify_types { uint64_t offset, length, type, result, count; };
struct remove_pages { uint64_t offset, length, count; };

#define MODIFY_TYPES _IOWR(0xA4, 0x06, struct modify_types)
#define REMOVE_PAGES _IOWR(0xA4, 0x07, struct remove_pages)

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void require(int fine, const char *what)
{
    if (!fine) {
        perror(what);
        exit(1);
    }
}

static void add(uint64_t pages, unsigned kind, uint64_t slices)
{
    unsigned char secinfo[64] __attribute__((aligned(64))) = {READ_WRITE, REGULAR};
    unsigned char *source = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    require(source != MAP_FAILED, "mmap");
    for (uint64_t i = 0; kind && i < pages * PAGE; i += 8)
        *(uint64_t *)(source + i) = i * 0x9E3779B97F4A7C15u + 1;
    for (uint64_t i = 0; i < slices; i++) {
        unsigned char first[64] = {0}, sigstruct[PAGE] = {0};
        struct sgx__add_pages request = {(uint64_t)source, 0, pages * PAGE, (uint64_t)secinfo,
                                         kind == 2 ? SGX__MEASURE : 0, 0};
        struct sgx_enclave enclave = {0};
        uint64_t size = PAGE, xfrm = X87_SSE;
        double start;

        while (size < pages * PAGE)
            size *= 2;
        memcpy(first + 12, &size, 8);
        first[8] = 1; /* SSAFRAMESIZE */
        sigstruct[928] = DEBUG_MODE64;
        memcpy(sigstruct + 936, &xfrm, 8);
        enclave.fd = open("/dev/sgx_enclave", O_RDWR | O_CLOEXEC);
        require(enclave.fd >= 0, "/dev/sgx_enclave");
        require(!sgx__create_enclave(&enclave, first, sigstruct), "CREATE");
        start = now();
        require(!ioctl(enclave.fd, SGX__ADD_PAGES, &request), "ADD_PAGES");
        printf("%.9f\n", now() - start);
        sgx_unload(&enclave);
    }
}

static void call(struct sgx_enclave *enclave, unsigned function, uint64_t at, uint64_t pages)
{
    uint64_t numbers[2] = {at, pages};
    long result;

    if (sgx_call(enclave, 0, function, numbers, sizeof(numbers), &result)) {
        fprintf(stderr, "%s\n", enclave->problem);
        exit(1);
    }
    if (result) {
        fprintf(stderr, "function %u: a page was not accepted: %ld\n", function, result);
        exit(1);
    }
}

static void grow(const char *path, uint64_t pages, uint64_t slices, unsigned function)
{
    struct sgx_enclave enclave;
    uint64_t length = pages * PAGE, offset;
    void *at;

    if (sgx_load(&enclave, path)) {
        fprintf(stderr, "%s\n", enclave.problem);
        exit(1);
    }
    offset = enclave.size - length;
    at = mmap((void *)(enclave.base + offset), length, PROT_READ | PROT_WRITE,
              MAP_SHARED | MAP_FIXED, enclave.fd, 0);
    require(at != MAP_FAILED, "mmap");
    for (uint64_t i = 0; i < slices; i++) {
        struct modify_types modify = {offset, length, TRIM, 0, 0};
        struct remove_pages remove = {offset, length, 0};
        double start = now(), middle;

        call(&enclave, function, (uint64_t)at, pages);
        middle = now();
        require(!ioctl(enclave.fd, MODIFY_TYPES, &modify), "MODIFY_TYPES");
        call(&enclave, ACCEPT_TRIM, (uint64_t)at, pages);
        require(!ioctl(enclave.fd, REMOVE_PAGES, &remove), "REMOVE_PAGES");
        printf("%.9f %.9f\n", middle - start, now() - middle);
    }
    sgx_unload(&enclave);
}

int main(int argc, char **argv)
{
    uint64_t numbers[3] = {0, 0, 0};

    if (argc < 5)
        return 2;
    for (int i = 2; i < argc && i < 5; i++)
        numbers[i - 2] = strtoull(argv[i], NULL, 10);
    if (!strcmp(argv[1], "add"))
        add(numbers[0], (unsigned)numbers[1], numbers[2]);
    else
        grow(argv[2], numbers[1], numbers[2], strcmp(argv[1], "grow") ? GROW_ALL : GROW);
    return 0;
}
