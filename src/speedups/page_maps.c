/* Pages by linear address: PageMap, a mapping to objects, RightsMap, one to numbers from 1 to 255, and
 * PageSet, a set.
 *
 * They are as dict and set with addresses of pages as keys, and ascending.  Neighbours share a block,
 * so that a page costs a pointer, a byte, or a bit, and C code needs no integer object to find it. */

#include "page_maps.h"

#include <stdlib.h>

#define FIRST_ROOM 8

/* --- blocks -------------------------------------------------------------------------------------- */

static size_t
place_of(uint64_t number, size_t room)
{
    return (size_t)(number * UINT64_C(0x9E3779B97F4A7C15) >> 32) & (room - 1);
}

static struct block *
find_block(Pages *self, uint64_t at)
{
    uint64_t number = (at >> MAP_BLOCK_SHIFT) + 1;

    if (self->room == 0)
        return NULL;
    if (self->blocks[self->latest].number == number)
        return &self->blocks[self->latest];
    for (size_t place = place_of(number, self->room); self->blocks[place].number;
         place = (place + 1) & (self->room - 1))
        if (self->blocks[place].number == number)
            return &self->blocks[self->latest = place];
    return NULL;
}

/* Put a block that the table does not have into a free place. */
static struct block *
put_block(Pages *self, struct block block)
{
    size_t place = place_of(block.number, self->room);

    while (self->blocks[place].number)
        place = (place + 1) & (self->room - 1);
    self->blocks[place] = block;
    self->taken++;
    return &self->blocks[self->latest = place];
}

/* Make room for one more block; those without pages are dropped. */
static int
grow(Pages *self)
{
    struct block *old = self->blocks;
    size_t room = self->room, used = 0;

    if (4 * (self->taken + 1) <= 3 * room)
        return 0;
    for (size_t place = 0; place < room; place++)
        used += old[place].there != 0;
    for (room = FIRST_ROOM; room < 2 * (used + 1);)
        room *= 2;
    self->blocks = PyMem_Calloc(room, sizeof *self->blocks);
    if (self->blocks == NULL) {
        self->blocks = old;
        PyErr_NoMemory();
        return -1;
    }
    used = self->room;
    self->room = room;
    self->taken = self->latest = 0;
    for (size_t place = 0; place < used; place++)
        if (old[place].there)
            put_block(self, old[place]);
    PyMem_Free(old);
    return 0;
}

/* The block of a page that is about to be put there, with so many bytes a page; NULL: an error. */
static struct block *
make_block(Pages *self, uint64_t at, size_t bytes)
{
    struct block *block = find_block(self, at);

    if (block == NULL && grow(self) == 0)
        block = put_block(self, (struct block){.number = (at >> MAP_BLOCK_SHIFT) + 1});
    if (block != NULL && bytes && block->room == NULL
        && (block->room = PyMem_Calloc(MAP_BLOCK_PAGES, bytes)) == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    return block;
}

static unsigned
index_of(uint64_t at)
{
    return at >> PAGE_SHIFT & (MAP_BLOCK_PAGES - 1);
}

static bool
is_there(const struct block *block, uint64_t at)
{
    return block != NULL && block->there >> index_of(at) & 1;
}

/* --- what other C code asks ---------------------------------------------------------------------- */

PyObject *
map_get(PyObject *self, uint64_t at)
{
    const struct block *block = find_block((Pages *)self, at);

    return is_there(block, at) ? block->objects[index_of(at)] : NULL;
}

int
map_put(PyObject *self, uint64_t at, PyObject *object)
{
    struct block *block = make_block((Pages *)self, at, sizeof(PyObject *));
    PyObject *old;

    if (block == NULL)
        return -1;
    old = block->objects[index_of(at)];
    Py_INCREF(block->objects[index_of(at)] = object);
    if (old == NULL) {
        block->there |= UINT64_C(1) << index_of(at);
        ((Pages *)self)->pages++;
    }
    Py_XDECREF(old);
    return 0;
}

/* Remove pages from their block. */
static void
remove_pages(Pages *self, struct block *block, uint64_t pages)
{
    self->pages -= __builtin_popcountll(block->there & pages);
    block->there &= ~pages;
    if (block->there == 0) {
        PyMem_Free(block->room);
        block->room = NULL;
    }
}

PyObject *
map_take(PyObject *self, uint64_t at)
{
    struct block *block = find_block((Pages *)self, at);
    PyObject *object;

    if (!is_there(block, at))
        return NULL;
    object = block->objects[index_of(at)];
    block->objects[index_of(at)] = NULL;
    remove_pages((Pages *)self, block, UINT64_C(1) << index_of(at));
    return object;
}

/* Objects that go may ask for pages. */
void
map_clear(PyObject *self)
{
    Pages *pages = (Pages *)self;
    struct block *blocks = pages->blocks;
    size_t room = pages->room;

    if (pages->taken == 0)
        return;
    pages->blocks = NULL;
    pages->room = pages->taken = pages->latest = 0;
    pages->pages = 0;
    for (size_t place = 0; place < room; place++) {
        for (uint64_t left = blocks[place].there; left; left &= left - 1)
            Py_DECREF(blocks[place].objects[__builtin_ctzll(left)]);
        PyMem_Free(blocks[place].objects);
    }
    PyMem_Free(blocks);
}

bool
set_has(PyObject *self, uint64_t at)
{
    return is_there(find_block((Pages *)self, at), at);
}

int
set_add(PyObject *self, uint64_t at)
{
    struct block *block = make_block((Pages *)self, at, 0);

    if (block == NULL)
        return -1;
    if (!is_there(block, at)) {
        block->there |= UINT64_C(1) << index_of(at);
        ((Pages *)self)->pages++;
    }
    return 0;
}

bool
set_discard(PyObject *self, uint64_t at)
{
    struct block *block = find_block((Pages *)self, at);

    if (!is_there(block, at))
        return false;
    remove_pages((Pages *)self, block, UINT64_C(1) << index_of(at));
    return true;
}

uint8_t
rights_get(PyObject *self, uint64_t at)
{
    const struct block *block = find_block((Pages *)self, at);

    return is_there(block, at) ? block->numbers[index_of(at)] : 0;
}

int
rights_put(PyObject *self, uint64_t at, uint8_t number)
{
    struct block *block = make_block((Pages *)self, at, 1);

    if (block == NULL)
        return -1;
    ((Pages *)self)->pages += !is_there(block, at);
    block->there |= UINT64_C(1) << index_of(at);
    block->numbers[index_of(at)] = number;
    return 0;
}

void
drop_range(PyObject *self, uint64_t start, uint64_t end)
{
    struct block *block;
    unsigned first;
    uint64_t count;

    start &= PAGE_MASK;
    end = (end + PAGE_BYTES - 1) & PAGE_MASK;
    for (; start < end; start += count << PAGE_SHIFT) {
        first = index_of(start);
        count = MAP_BLOCK_PAGES - first;
        if (count > (end - start) >> PAGE_SHIFT)
            count = (end - start) >> PAGE_SHIFT;
        if ((block = find_block((Pages *)self, start)) != NULL)
            remove_pages((Pages *)self, block, ~UINT64_C(0) >> (MAP_BLOCK_PAGES - count) << first);
    }
}

Py_ssize_t
pages_in(PyObject *self)
{
    return ((Pages *)self)->pages;
}

void
set_clear(PyObject *self)
{
    Pages *pages = (Pages *)self;

    if (pages->pages)
        for (size_t place = 0; place < pages->room; place++)
            pages->blocks[place].there = 0;
    pages->pages = 0;
}

static int
by_number(const void *one, const void *other)
{
    uint64_t first = *(const uint64_t *)one, second = *(const uint64_t *)other;

    return first < second ? -1 : first > second;
}

/* Append the pages of a block that are in a range; those of the last page are within it. */
static size_t
add_pages_of(const struct block *block, uint64_t first, uint64_t last, uint64_t *found, size_t count)
{
    for (uint64_t left = block->there, at; left; left &= left - 1) {
        at = (block->number - 1) << MAP_BLOCK_SHIFT | (uint64_t)__builtin_ctzll(left) << PAGE_SHIFT;
        if (at >= first && at <= last)
            found[count++] = at;
    }
    return count;
}

uint64_t *
pages_within(Pages *pages, uint64_t first, uint64_t last, size_t *count)
{
    uint64_t *found = PyMem_Malloc((size_t)pages->pages * sizeof *found + 1);
    uint64_t blocks = (last >> MAP_BLOCK_SHIFT) - (first >> MAP_BLOCK_SHIFT) + 1;
    const struct block *block;

    *count = 0;
    if (found == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if (blocks < pages->room) {
        for (uint64_t at = first; blocks; blocks--, at += 1 << MAP_BLOCK_SHIFT)
            if ((block = find_block(pages, at)) != NULL)
                *count = add_pages_of(block, first, last, found, *count);
        return found;
    }
    for (size_t place = 0; place < pages->room; place++)
        *count = add_pages_of(&pages->blocks[place], first, last, found, *count);
    qsort(found, *count, sizeof *found, by_number);
    return found;
}

uint64_t *
pages_of(PyObject *self)
{
    size_t count;

    return pages_within((Pages *)self, 0, UINT64_MAX, &count);
}

size_t
find_runs(const uint64_t *pages, size_t count, struct run *runs)
{
    size_t found = 0;

    for (size_t index = 0; index < count; index++) {
        if (found && runs[found - 1].end == pages[index])
            runs[found - 1].end += PAGE_BYTES;
        else
            runs[found++] = (struct run){pages[index], pages[index] + PAGE_BYTES};
    }
    return found;
}
