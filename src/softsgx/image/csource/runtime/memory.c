/* Copying, and a heap: a list of free blocks by address, the first that fits, neighbours joined. */

#include <softsgx.h>

#define ALIGNMENT 16
#define USED ((struct block *)0x5553454455534544) /* in `next` of a block that is handed out */

struct block {
    size_t size; /* header included; a multiple of ALIGNMENT */
    struct block *next;
};

static struct block *free_blocks;
static char lock;

void sgx__heap_init(unsigned char *start, size_t size);

void *memcpy(void *to, const void *from, size_t size)
{
    void *at = to;

    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
    return to;
}

void *memmove(void *to, const void *from, size_t size)
{
    unsigned char *target = to;
    const unsigned char *source = from;

    if ((uintptr_t)target - (uintptr_t)source >= size)
        return memcpy(to, from, size);
    /* The target begins inside the source: from the end, and the direction flag stays clear. */
    while (size--) {
        target[size] = source[size];
        __asm__ volatile("" : : : "memory"); /* or the compiler makes it a call of memmove */
    }
    return to;
}

void *memset(void *to, int byte, size_t size)
{
    void *at = to;

    __asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(byte) : "memory");
    return to;
}

int memcmp(const void *one, const void *other, size_t size)
{
    const unsigned char *a = one, *b = other;

    for (size_t i = 0; i < size; i++)
        if (a[i] != b[i])
            return a[i] - b[i];
    return 0;
}

size_t strlen(const char *text)
{
    size_t length = 0;

    while (text[length]) {
        length++;
        __asm__ volatile(""); /* or the compiler makes it a call of strlen */
    }
    return length;
}

static void take_lock(void)
{
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE))
        __builtin_ia32_pause();
}

static void release_lock(void)
{
    __atomic_clear(&lock, __ATOMIC_RELEASE);
}

void sgx__heap_init(unsigned char *start, size_t size)
{
    if (size < sizeof(struct block))
        return;
    free_blocks = (struct block *)start;
    free_blocks->size = size;
    free_blocks->next = NULL;
}

/* Return the first `need` bytes of `block`, or all of it, and leave the rest in the list. */
static struct block *carve(struct block *block, struct block **link, size_t need)
{
    if (block->size - need <= sizeof(struct block)) {
        *link = block->next;
        return block;
    }
    struct block *rest = (struct block *)((unsigned char *)block + need);
    rest->size = block->size - need;
    rest->next = block->next;
    *link = rest;
    block->size = need;
    return block;
}

void *malloc(size_t size)
{
    struct block *found = NULL;

    if (size > PTRDIFF_MAX)
        return NULL;
    size_t need = (size + sizeof(struct block) + ALIGNMENT - 1) & -(size_t)ALIGNMENT;
    take_lock();
    for (struct block **link = &free_blocks; *link; link = &(*link)->next) {
        if ((*link)->size >= need) {
            found = carve(*link, link, need);
            found->next = USED;
            break;
        }
    }
    release_lock();
    return found ? found + 1 : NULL;
}

void free(void *memory)
{
    if (!memory)
        return;
    struct block *block = (struct block *)memory - 1;
    struct block *before = NULL;

    take_lock();
    if (block->next != USED)
        sgx_abort(); /* freed twice, or never handed out */
    struct block *after = free_blocks;
    while (after && after < block) {
        before = after;
        after = after->next;
    }
    block->next = after;
    if (after && (unsigned char *)block + block->size == (unsigned char *)after) {
        block->size += after->size;
        block->next = after->next;
    }
    if (!before) {
        free_blocks = block;
    } else if ((unsigned char *)before + before->size == (unsigned char *)block) {
        before->size += block->size;
        before->next = block->next;
    } else {
        before->next = block;
    }
    release_lock();
}

void *calloc(size_t count, size_t size)
{
    size_t bytes;

    if (__builtin_mul_overflow(count, size, &bytes))
        return NULL;
    void *memory = malloc(bytes);
    return memory ? memset(memory, 0, bytes) : NULL;
}

void *realloc(void *memory, size_t size)
{
    if (!memory)
        return malloc(size);
    size_t have = ((struct block *)memory - 1)->size - sizeof(struct block);
    if (size <= have)
        return memory;
    void *larger = malloc(size);
    if (!larger)
        return NULL;
    memcpy(larger, memory, have);
    free(memory);
    return larger;
}
