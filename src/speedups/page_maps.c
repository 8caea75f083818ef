/* Pages by linear address: PageMap, a mapping to objects, and PageSet, a set.
 *
 * They are as dict and set with addresses of pages as keys, and ascending.  Neighbours share a block,
 * so that a page costs a pointer, or a bit, and C code needs no integer object to find it. */

#include "memory.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK_SHIFT 18
#define BLOCK_PAGES 64
#define FIRST_ROOM 8

/* A place of the hash table; it keeps its number when the last page has gone. */
struct block {
    uint64_t number; /* plus one; 0: the place is free */
    uint64_t there;  /* a bit for each page */
    PyObject **objects; /* NULL: of a set, or no page is there */
};

/* The block that was found last is often asked for again. */
typedef struct {
    PyObject_HEAD
    struct block *blocks;
    size_t room, taken, latest; /* room: a power of 2, or 0 */
    Py_ssize_t pages;
} Pages;

PyTypeObject *page_map_type, *page_set_type;

/* --- blocks -------------------------------------------------------------------------------------- */

static size_t
place_of(uint64_t number, size_t room)
{
    return (size_t)(number * UINT64_C(0x9E3779B97F4A7C15) >> 32) & (room - 1);
}

static struct block *
find_block(Pages *self, uint64_t at)
{
    uint64_t number = (at >> BLOCK_SHIFT) + 1;

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

/* The block of a page that is about to be put there; NULL: an error. */
static struct block *
make_block(Pages *self, uint64_t at, bool with_objects)
{
    struct block *block = find_block(self, at);

    if (block == NULL && grow(self) == 0)
        block = put_block(self, (struct block){.number = (at >> BLOCK_SHIFT) + 1});
    if (block != NULL && with_objects && block->objects == NULL
        && (block->objects = PyMem_Calloc(BLOCK_PAGES, sizeof(PyObject *))) == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    return block;
}

static unsigned
index_of(uint64_t at)
{
    return at >> PAGE_SHIFT & (BLOCK_PAGES - 1);
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
    struct block *block = make_block((Pages *)self, at, true);
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

/* Remove a page from its block, which has it; its object, or NULL of a set. */
static PyObject *
take_page(Pages *self, struct block *block, uint64_t at)
{
    PyObject *object = NULL;

    block->there &= ~(UINT64_C(1) << index_of(at));
    self->pages--;
    if (block->objects != NULL) {
        object = block->objects[index_of(at)];
        block->objects[index_of(at)] = NULL;
        if (block->there == 0) {
            PyMem_Free(block->objects);
            block->objects = NULL;
        }
    }
    return object;
}

PyObject *
map_take(PyObject *self, uint64_t at)
{
    struct block *block = find_block((Pages *)self, at);

    return is_there(block, at) ? take_page((Pages *)self, block, at) : NULL;
}

bool
set_has(PyObject *self, uint64_t at)
{
    return is_there(find_block((Pages *)self, at), at);
}

int
set_add(PyObject *self, uint64_t at)
{
    struct block *block = make_block((Pages *)self, at, false);

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
    take_page((Pages *)self, block, at);
    return true;
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

uint64_t *
pages_of(PyObject *self)
{
    Pages *pages = (Pages *)self;
    uint64_t *found = PyMem_Malloc((size_t)pages->pages * sizeof *found + 1);
    Py_ssize_t count = 0;

    if (found == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (size_t place = 0; place < pages->room; place++)
        for (uint64_t left = pages->blocks[place].there; left; left &= left - 1)
            found[count++] = (pages->blocks[place].number - 1) << BLOCK_SHIFT
                | (uint64_t)__builtin_ctzll(left) << PAGE_SHIFT;
    qsort(found, (size_t)count, sizeof *found, by_number);
    return found;
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

/* --- as dict and set ----------------------------------------------------------------------------- */

/* The address that a key is: 1, 0: it can be no page, or -1 with an error. */
static int
read_key(PyObject *key, uint64_t *at)
{
    if (!PyLong_Check(key))
        return PyObject_Hash(key) == -1 ? -1 : 0;
    *at = PyLong_AsUnsignedLongLong(key);
    if (*at == (uint64_t)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
        return 0;
    }
    return *at % PAGE_BYTES == 0;
}

static int
read_page(PyObject *key, uint64_t *at)
{
    int status = read_key(key, at);

    if (status == 0)
        PyErr_Format(PyExc_ValueError, "%R is no page", key);
    return status > 0 ? 0 : -1;
}

static int
has_page(PyObject *self, PyObject *key)
{
    uint64_t at;
    int status = read_key(key, &at);

    return status > 0 ? set_has(self, at) : status;
}

static PyObject *
list_pages(PyObject *self)
{
    uint64_t *found = pages_of(self);
    Py_ssize_t count = pages_in(self);
    PyObject *list = found == NULL ? NULL : PyList_New(count), *number;

    for (Py_ssize_t index = 0; list != NULL && index < count; index++) {
        number = PyLong_FromUnsignedLongLong(found[index]);
        if (number == NULL || PyList_SetItem(list, index, number) < 0)
            Py_CLEAR(list);
    }
    PyMem_Free(found);
    return list;
}

static PyObject *
iterate(PyObject *self)
{
    PyObject *list = list_pages(self), *iterator = list == NULL ? NULL : PyObject_GetIter(list);

    Py_XDECREF(list);
    return iterator;
}

static PyObject *
map_subscript(PyObject *self, PyObject *key)
{
    uint64_t at;
    int status = read_key(key, &at);
    PyObject *object = status > 0 ? map_get(self, at) : NULL;

    if (object == NULL && status >= 0)
        PyErr_SetObject(PyExc_KeyError, key);
    Py_XINCREF(object);
    return object;
}

static int
map_assign(PyObject *self, PyObject *key, PyObject *object)
{
    PyObject *old;
    uint64_t at;
    int status;

    if (object != NULL)
        return read_page(key, &at) < 0 ? -1 : map_put(self, at, object);
    if ((status = read_key(key, &at)) < 0)
        return -1;
    old = status ? map_take(self, at) : NULL;
    if (old == NULL) {
        PyErr_SetObject(PyExc_KeyError, key);
        return -1;
    }
    Py_DECREF(old);
    return 0;
}

/* As get() and, where the page is taken, pop() of a dict. */
static PyObject *
get_or(PyObject *self, PyObject *const *args, Py_ssize_t count, bool take)
{
    PyObject *object = NULL;
    uint64_t at;
    int status;

    if (count < 1 || count > 2) {
        PyErr_SetString(PyExc_TypeError, "a page and a default are expected");
        return NULL;
    }
    if ((status = read_key(args[0], &at)) < 0)
        return NULL;
    if (status)
        object = take ? map_take(self, at) : map_get(self, at);
    if (object != NULL && take)
        return object;
    if (object == NULL && count == 1 && take) {
        PyErr_SetObject(PyExc_KeyError, args[0]);
        return NULL;
    }
    if (object == NULL)
        object = count == 2 ? args[1] : Py_None;
    Py_INCREF(object);
    return object;
}

static PyObject *
map_get_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return get_or(self, args, count, false);
}

static PyObject *
map_pop(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return get_or(self, args, count, true);
}

static PyObject *
set_add_method(PyObject *self, PyObject *key)
{
    uint64_t at;

    if (read_page(key, &at) < 0 || set_add(self, at) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
set_discard_method(PyObject *self, PyObject *key)
{
    uint64_t at;
    int status = read_key(key, &at);

    if (status < 0)
        return NULL;
    if (status)
        set_discard(self, at);
    Py_RETURN_NONE;
}

static PyObject *
set_clear_method(PyObject *self, PyObject *Py_UNUSED(none))
{
    set_clear(self);
    Py_RETURN_NONE;
}

/* Call one of the two above for each page of an iterable. */
static PyObject *
for_each(PyObject *self, PyObject *pages, PyObject *(*method)(PyObject *, PyObject *))
{
    PyObject *iterator = PyObject_GetIter(pages), *page, *done = iterator;

    while (done != NULL && (page = PyIter_Next(iterator)) != NULL) {
        if ((done = method(self, page)) != NULL)
            Py_DECREF(done);
        Py_DECREF(page);
    }
    Py_XDECREF(iterator);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
set_update(PyObject *self, PyObject *pages)
{
    return for_each(self, pages, set_add_method);
}

static PyObject *
set_difference_update(PyObject *self, PyObject *pages)
{
    return for_each(self, pages, set_discard_method);
}

/* --- the types ----------------------------------------------------------------------------------- */

static int
traverse(PyObject *self, visitproc visit, void *arg)
{
    Pages *pages = (Pages *)self;

    for (size_t place = 0; place < pages->room; place++)
        for (uint64_t left = pages->blocks[place].there; left; left &= left - 1)
            Py_VISIT(pages->blocks[place].objects[__builtin_ctzll(left)]);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

/* Objects that go may ask for pages. */
static int
map_clear(PyObject *self)
{
    Pages *pages = (Pages *)self;
    struct block *blocks = pages->blocks;
    size_t room = pages->room;

    pages->blocks = NULL;
    pages->room = pages->taken = pages->latest = 0;
    pages->pages = 0;
    for (size_t place = 0; place < room; place++) {
        for (uint64_t left = blocks[place].there; left; left &= left - 1)
            Py_DECREF(blocks[place].objects[__builtin_ctzll(left)]);
        PyMem_Free(blocks[place].objects);
    }
    PyMem_Free(blocks);
    return 0;
}

static PyObject *
map_clear_method(PyObject *self, PyObject *Py_UNUSED(none))
{
    map_clear(self);
    Py_RETURN_NONE;
}

static void
free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static void
map_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    map_clear(self);
    free_object(self);
}

static void
set_dealloc(PyObject *self)
{
    PyMem_Free(((Pages *)self)->blocks);
    free_object(self);
}

#define FAST(function) ((PyCFunction)(void (*)(void))function)

static PyMethodDef map_methods[] = {
    {"get", FAST(map_get_method), METH_FASTCALL, "get(page, default=None): as of a dict."},
    {"pop", FAST(map_pop), METH_FASTCALL, "pop(page, default): as of a dict."},
    {"clear", map_clear_method, METH_NOARGS, "Remove all pages."},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef set_methods[] = {
    {"add", set_add_method, METH_O, "Add a page."},
    {"discard", set_discard_method, METH_O, "Remove a page, if it is there."},
    {"update", set_update, METH_O, "Add each of some pages."},
    {"difference_update", set_difference_update, METH_O, "Remove each of some pages."},
    {"clear", set_clear_method, METH_NOARGS, "Remove all pages."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *
make_type(PyObject *module, const char *name, unsigned long flags, PyType_Slot *slots)
{
    PyType_Spec spec = {
        .name = name,
        .basicsize = sizeof(Pages),
        .flags = (unsigned)(Py_TPFLAGS_DEFAULT | flags),
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);

    if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0)
        Py_CLEAR(type);
    return (PyTypeObject *)type;
}

int
add_page_maps(PyObject *module)
{
    PyType_Slot map_slots[] = {
        {Py_tp_dealloc, (void *)map_dealloc},
        {Py_tp_traverse, (void *)traverse},
        {Py_tp_clear, (void *)map_clear},
        {Py_tp_hash, (void *)PyObject_HashNotImplemented},
        {Py_tp_iter, (void *)iterate},
        {Py_tp_methods, map_methods},
        {Py_mp_length, (void *)pages_in},
        {Py_mp_subscript, (void *)map_subscript},
        {Py_mp_ass_subscript, (void *)map_assign},
        {Py_sq_contains, (void *)has_page},
        {0, NULL},
    };
    PyType_Slot set_slots[] = {
        {Py_tp_dealloc, (void *)set_dealloc},
        {Py_tp_hash, (void *)PyObject_HashNotImplemented},
        {Py_tp_iter, (void *)iterate},
        {Py_tp_methods, set_methods},
        {Py_sq_length, (void *)pages_in},
        {Py_sq_contains, (void *)has_page},
        {0, NULL},
    };

    page_map_type = make_type(module, "softsgx._speedups.PageMap", Py_TPFLAGS_HAVE_GC, map_slots);
    page_set_type = make_type(module, "softsgx._speedups.PageSet", 0, set_slots);
    return page_map_type == NULL || page_set_type == NULL ? -1 : 0;
}
