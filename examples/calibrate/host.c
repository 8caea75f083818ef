/* calibrate ENCLAVE [PAGES [CALLS]]: print what SGX costs on this processor, as a profile.
 *
 * PAGES of enclave memory, which must not fit the EPC, are touched in order, again and again, so
 * that each touch evicts a page and loads another one.  A call that does nothing is EENTER and
 * EEXIT, with the few instructions around them.
 *
 * The profile is for `softsgx plan --costs FILE.toml` and `softsgx run --costs FILE.toml`. */

#include "../common.h"
#include "calibrate.h"

#include <cpuid.h>
#include <x86intrin.h>

enum { ROUNDS = 3, PART = 64 };

struct band {
    uint64_t low, typical, high;
};

static uint64_t now(void)
{
    _mm_lfence();
    return __rdtsc();
}

static int by_size(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;

    return (a > b) - (a < b);
}

/* The middle and both ends, without the tenth of the samples at each end. */
static struct band band_of(uint64_t *samples, size_t count)
{
    struct band band;

    qsort(samples, count, sizeof(*samples), by_size);
    band.low = samples[count / 10];
    band.typical = samples[count / 2];
    band.high = samples[count - 1 - count / 10];
    return band;
}

static double hertz(void)
{
    double start = seconds();
    uint64_t cycles = now();

    while (seconds() - start < 0.2)
        ;
    return (double)(now() - cycles) / (seconds() - start);
}

static struct band calls(struct sgx_enclave *enclave, uint64_t *samples, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t start = now();
        must_call(enclave, NOTHING, NULL, 0);
        samples[i] = now() - start;
    }
    return band_of(samples, count);
}

/* Cycles a page, the calls taken off. */
static struct band touches(struct sgx_enclave *enclave, uint64_t *samples, uint64_t first,
                           uint64_t pages, uint64_t call)
{
    size_t count = 0;

    for (int round = 0; round < ROUNDS; round++)
        for (uint64_t page = 0; page + PART <= pages; page += PART) {
            struct request request = {first + page, PART};
            uint64_t start = now();
            must_call(enclave, TOUCH, &request, sizeof(request));
            uint64_t taken = now() - start;
            samples[count++] = taken > call ? (taken - call) / PART : 0;
        }
    return band_of(samples, count);
}

static void print_processor(void)
{
    union {
        unsigned int words[13];
        char text[52];
    } name = {{0}};

    for (unsigned int i = 0; i < 3; i++)
        __get_cpuid(0x80000002 + i, &name.words[4 * i], &name.words[4 * i + 1],
                    &name.words[4 * i + 2], &name.words[4 * i + 3]);
    time_t today = time(NULL);
    char date[16] = "";
    strftime(date, sizeof(date), "%Y-%m-%d", gmtime(&today));
    /* The text is quoted in TOML: it must not end the quotation. */
    for (char *at = name.text; *at; at++)
        if (*at == '"' || *at == '\\' || *at < ' ')
            *at = ' ';
    printf("source = \"examples/calibrate on %s, %s\"\n", name.text, date);
}

static void print_band(const char *event, struct band band)
{
    printf("\n[prices.%s]\nlow = %llu\ntypical = %llu\nhigh = %llu\n", event,
           (unsigned long long)band.low, (unsigned long long)band.typical,
           (unsigned long long)band.high);
}

int main(int argc, char **argv)
{
    static struct sgx_enclave enclave;
    uint64_t pages = number(argc, argv, 2, 65536), count = number(argc, argv, 3, 10000);

    if (argc < 2 || pages < 2 * PART || pages > 1 << 28 || !count || count > 1 << 28) {
        fprintf(stderr, "usage: calibrate ENCLAVE [PAGES, from %d on [CALLS]]\n", 2 * PART);
        return 2;
    }
    must_load(&enclave, argv[1]);
    size_t room = count > ROUNDS * pages ? count : ROUNDS * pages;
    uint64_t *samples = malloc(room * sizeof(*samples));
    if (!samples)
        return 1;
    struct request request = {0, pages};
    must_call(&enclave, RESERVE, &request, sizeof(request));
    must_call(&enclave, TOUCH, &request, sizeof(request));

    struct band call = calls(&enclave, samples, count);
    struct band swap = touches(&enclave, samples, 0, pages, call.typical);
    struct band resident = touches(&enclave, samples, pages - PART, PART, call.typical);
    sgx_unload(&enclave);
    if (swap.typical < 4 * (resident.low + 100)) {
        fprintf(stderr,
                "calibrate: a touch takes %llu cycles, so no page was swapped; build with a larger "
                "--heap, and give more PAGES than the EPC has\n",
                (unsigned long long)swap.typical);
        return 1;
    }
    printf("name = \"calibrated\"\nhertz = %.0f\n", hertz());
    print_processor();
    print_band("eenter", call);
    print_band("swap", swap);
    free(samples);
    return 0;
}
