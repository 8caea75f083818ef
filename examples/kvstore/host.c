/* kvstore ENCLAVE [RECORDS]: fill a store inside with RECORDS values, use it, and check every
 * answer.
 *
 * Four reads in five go to a fifth of the records, one request in ten
 * replaces a value by another of another size, and at last every tenth record is deleted.  Values follow from key and version,
 * so the host knows what must come back and keeps only the versions. */

#include "../common.h"
#include "kvstore.h"

enum { BATCH = 64 };

static struct sgx_enclave enclave;
static struct request requests[BATCH];
static char keys[BATCH][MAX_KEY], values[BATCH][MAX_VALUE];
static uint64_t whose[BATCH], waiting, checksum;
static uint8_t *versions; /* of each record; 0: deleted */

static uint32_t value_of(uint64_t record, uint8_t version, char *value)
{
    uint64_t seed = mix(record * 256 + version);
    uint32_t size = 128 + (uint32_t)(seed % 257);

    for (uint32_t i = 0; i < size; i++)
        value[i] = (char)(mix(seed + i / 8) >> i % 8 * 8);
    return size;
}

static void flush(void)
{
    static char wanted[MAX_VALUE];

    must_call(&enclave, RUN, requests, waiting * sizeof(requests[0]));
    for (uint64_t i = 0; i < waiting; i++) {
        uint32_t size;
        if (requests[i].what != GET)
            continue;
        size = versions[whose[i]] ? value_of(whose[i], versions[whose[i]], wanted) : 0;
        if (requests[i].found != !!size ||
            (size && (requests[i].value_size != size || memcmp(values[i], wanted, size)))) {
            fprintf(stderr, "kvstore: record %llu is not what was stored\n",
                    (unsigned long long)whose[i]);
            exit(1);
        }
        for (uint32_t at = 0; at < size; at++)
            checksum = checksum * 31 + (unsigned char)values[i][at];
    }
    waiting = 0;
}

static void ask(uint32_t what, uint64_t record)
{
    /* A batch is served in order, but reads are checked after it. */
    for (uint64_t i = 0; i < waiting; i++)
        if (whose[i] == record) {
            flush();
            break;
        }
    struct request *request = &requests[waiting];

    whose[waiting] = record;
    request->what = what;
    request->key = keys[waiting];
    request->value = values[waiting];
    request->key_size = (uint32_t)snprintf(keys[waiting], MAX_KEY, "record:%llu",
                                           (unsigned long long)record);
    request->value_size = what == GET ? MAX_VALUE : 0;
    if (what == PUT)
        request->value_size = value_of(record, ++versions[record], values[waiting]);
    if (what == DELETE)
        versions[record] = 0;
    if (++waiting == BATCH)
        flush();
}

int main(int argc, char **argv)
{
    uint64_t records = number(argc, argv, 2, 32000), seed = 1;

    if (argc < 2 || records < 16) {
        fprintf(stderr, "usage: kvstore ENCLAVE [RECORDS, 16 or more]\n");
        return 2;
    }
    must_load(&enclave, argv[1]);
    versions = calloc(records, 1);
    if (!versions)
        return 1;
    double start = seconds();
    must_call(&enclave, OPEN, &records, sizeof(records));
    for (uint64_t record = 0; record < records; record++)
        ask(PUT, record);
    for (uint64_t i = 0; i < records; i++) {
        seed = mix(seed + i);
        uint64_t record = mix(seed) % ((seed >> 32) % 5 ? records / 5 : records);
        /* A version is a byte; it must not come round to 0. */
        ask((seed >> 40) % 10 || versions[record] == UINT8_MAX ? GET : PUT, record);
    }
    for (uint64_t record = 0; record < records; record += 10)
        ask(DELETE, record);
    for (uint64_t record = 0; record < records; record += 5)
        ask(GET, record);
    flush();
    double taken = seconds() - start;
    sgx_unload(&enclave);
    printf("kvstore: %llu records, every answer verified, checksum %016llx, %.2f s\n",
           (unsigned long long)records, (unsigned long long)checksum, taken);
    return 0;
}
