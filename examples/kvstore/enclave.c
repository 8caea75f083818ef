/* A key-value store inside: a hash table whose entries lie in the heap.
 *
 * Requests lie in the host's memory, which may change at any time: each is copied in, checked, and
 * only the copy is used. */

#include <softsgx.h>

#include "kvstore.h"

struct entry {
    struct entry *next;
    uint32_t key_size, value_size;
    char bytes[]; /* key, then value */
};

static struct entry **table;
static uint64_t mask;

static uint64_t hash(const char *key, size_t size)
{
    uint64_t sum = 0xcbf29ce484222325u;

    while (size--)
        sum = (sum ^ (unsigned char)*key++) * 0x100000001b3u;
    return sum ^ sum >> 32;
}

static struct entry **find(const char *key, uint32_t size)
{
    struct entry **link = &table[hash(key, size) & mask];

    while (*link && ((*link)->key_size != size || memcmp((*link)->bytes, key, size)))
        link = &(*link)->next;
    return link;
}

static void drop(struct entry **link)
{
    struct entry *entry = *link;

    *link = entry->next;
    free(entry);
}

static int put(struct entry **link, const char *key, const struct request *request)
{
    struct entry *entry = malloc(sizeof(*entry) + request->key_size + request->value_size);

    if (!entry)
        return -1;
    if (*link)
        drop(link);
    entry->key_size = request->key_size;
    entry->value_size = request->value_size;
    memcpy(entry->bytes, key, request->key_size);
    memcpy(entry->bytes + request->key_size, request->value, request->value_size);
    entry->next = *link;
    *link = entry;
    return 0;
}

/* 1 when the key was there, 0 when not, -1 when the request is refused. */
static int serve(const struct request *request, uint32_t *value_size)
{
    char key[MAX_KEY];

    if (request->key_size > MAX_KEY || request->value_size > MAX_VALUE ||
        !sgx_is_outside(request->key, request->key_size) ||
        !sgx_is_outside(request->value, request->value_size))
        return -1;
    memcpy(key, request->key, request->key_size);
    struct entry **link = find(key, request->key_size);
    int found = *link != NULL;
    switch (request->what) {
    case PUT:
        return put(link, key, request) ? -1 : found;
    case GET:
        if (!found)
            return 0;
        if ((*link)->value_size > request->value_size)
            return -1;
        *value_size = (*link)->value_size;
        memcpy(request->value, (*link)->bytes + request->key_size, *value_size);
        return 1;
    case DELETE:
        if (found)
            drop(link);
        return found;
    }
    return -1;
}

static long run(struct request *outside, size_t count)
{
    long found = 0;

    for (size_t i = 0; i < count; i++) {
        struct request request;
        memcpy(&request, &outside[i], sizeof(request));
        uint32_t value_size = request.value_size;
        int result = table ? serve(&request, &value_size) : -1;
        if (result < 0)
            return -1;
        outside[i].found = result;
        outside[i].value_size = value_size;
        found += result;
    }
    return found;
}

static int open(uint64_t entries)
{
    uint64_t buckets = 16;

    while (buckets < entries && buckets < UINT64_MAX / 4)
        buckets *= 2;
    table = calloc(buckets, sizeof(*table));
    mask = buckets - 1;
    return table ? 0 : -1;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    uint64_t entries;

    if (function == OPEN && size == sizeof(entries)) {
        memcpy(&entries, argument, sizeof(entries));
        return open(entries);
    }
    if (function == RUN && size % sizeof(struct request) == 0)
        return run(argument, size / sizeof(struct request));
    return -1;
}
