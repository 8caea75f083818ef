/* Copying, and a heap: blocks are handed out one behind the other, and again when they were freed,
 * to callers that ask for about the same size.  They are neither joined nor split, and long lists are
 * not searched: in an enclave a walk through memory is a walk through paging. */

#include <softsgx.h>

#define ALIGNMENT 16
#define CLASSES 256 /* four to each doubling of size */
#define LOOKED_AT 8
#define USED ((struct block *)0x5553454455534544) /* in `next` of a block that is handed out */

struct block {
    size_t size; /* header included; a multiple of ALIGNMENT */
    struct block *next;
};

static struct block *freed[CLASSES];
static unsigned char *top, *end; /* what was never handed out */
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
    top = start;
    end = start + size;
}

/* The class of a size: every block of a higher class is larger. */
static unsigned class_of(size_t size)
{
    unsigned doubling = 63 - (unsigned)__builtin_clzl(size);

    return doubling * 4 + (size >> (doubling - 2) & 3);
}

/* Take a block of at least `need` bytes from the lists.  Only a few are looked at: each may lie on
 * a page that has to be loaded first. */
static struct block *reuse(size_t need)
{
    unsigned class = class_of(need);
    struct block **link = &freed[class], *found;

    for (int i = 0; *link && (*link)->size < need; i++, link = &(*link)->next)
        if (i == LOOKED_AT)
            return NULL;
    for (unsigned larger = class + 1; !*link && larger <= class + 4; larger++)
        link = &freed[larger];
    found = *link;
    if (found)
        *link = found->next;
    return found;
}

static struct block *extend(size_t need)
{
    struct block *block = (struct block *)top;

    if ((size_t)(end - top) < need)
        return NULL;
    top += need;
    block->size = need;
    return block;
}

void *malloc(size_t size)
{
    if (size > PTRDIFF_MAX)
        return NULL;
    size_t need = (size + sizeof(struct block) + ALIGNMENT - 1) & -(size_t)ALIGNMENT;
    take_lock();
    struct block *block = reuse(need);
    if (!block)
        block = extend(need);
    if (block)
        block->next = USED;
    release_lock();
    return block ? block + 1 : NULL;
}

void free(void *memory)
{
    if (!memory)
        return;
    struct block *block = (struct block *)memory - 1;

    take_lock();
    if (block->next != USED)
        sgx_abort(); /* freed twice, or never handed out */
    if ((unsigned char *)block + block->size == top) {
        block->next = NULL;
        top = (unsigned char *)block;
    } else {
        struct block **list = &freed[class_of(block->size)];
        block->next = *list;
        *list = block;
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
