/* PageMap, RightsMap and PageSet in Python: as dict and set.  See page_maps.c. */

#include "page_maps.h"

PyTypeObject *page_map_type, *rights_map_type, *page_set_type;

/* The page that a key is: 1, 0: it can be none, or -1 with an error.  RightsMaps take any address in a
 * page. */
static int
read_key(PyObject *self, PyObject *key, uint64_t *at)
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
    if (PyObject_TypeCheck(self, rights_map_type))
        *at &= PAGE_MASK;
    return *at % PAGE_BYTES == 0;
}

static int
read_page(PyObject *self, PyObject *key, uint64_t *at)
{
    int status = read_key(self, key, at);

    if (status == 0)
        PyErr_Format(PyExc_ValueError, "%R is no page", key);
    return status > 0 ? 0 : -1;
}

static int
has_page(PyObject *self, PyObject *key)
{
    uint64_t at;
    int status = read_key(self, key, &at);

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
    int status = read_key(self, key, &at);
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
        return read_page(self, key, &at) < 0 ? -1 : map_put(self, at, object);
    if ((status = read_key(self, key, &at)) < 0)
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
    if ((status = read_key(self, args[0], &at)) < 0)
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

    if (read_page(self, key, &at) < 0 || set_add(self, at) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
discard(PyObject *self, PyObject *key)
{
    uint64_t at;
    int status = read_key(self, key, &at);

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
    return for_each(self, pages, discard);
}

/* --- rights, as a mapping that derives from RightsMap ------------------------------------------- */

static PyObject *
rights_subscript(PyObject *self, PyObject *key)
{
    uint64_t at;
    int status = read_key(self, key, &at);

    if (status > 0 && set_has(self, at))
        return PyLong_FromLong(rights_get(self, at));
    if (status >= 0)
        PyErr_SetObject(PyExc_KeyError, key);
    return NULL;
}

static int
rights_assign(PyObject *self, PyObject *key, PyObject *number)
{
    uint64_t at;
    long value;
    int status;

    if (number == NULL) {
        if ((status = read_key(self, key, &at)) > 0 && set_discard(self, at))
            return 0;
        if (status >= 0)
            PyErr_SetObject(PyExc_KeyError, key);
        return -1;
    }
    value = PyLong_AsLong(number);
    if ((value == -1 && PyErr_Occurred()) || (status = read_key(self, key, &at)) < 0)
        return -1;
    if (status == 0) {
        PyErr_Format(PyExc_ValueError, "%R is in no page", key);
        return -1;
    }
    if (value > 0 && value <= UINT8_MAX)
        return rights_put(self, at, (uint8_t)value);
    if (value)
        PyErr_SetString(PyExc_OverflowError, "a number of a page is from 1 to 255");
    else
        PyErr_Format(PyExc_AssertionError, "page %R is there without rights", key);
    return -1;
}

/* An end of a range, which may be beyond all addresses. */
static int
read_end(PyObject *number, uint64_t *end)
{
    int overflow = 0;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);

    if (value == -1 && !overflow && PyErr_Occurred())
        return -1;
    *end = overflow < 0 || (!overflow && value < 0) ? 0 : (uint64_t)value;
    if (overflow > 0 && (*end = PyLong_AsUnsignedLongLong(number)) == UINT64_MAX)
        PyErr_Clear();
    return 0;
}

/* within(start, end): the pages of a range, huge and sparse perhaps, and their numbers. */
static PyObject *
rights_within(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t start, end, *found = NULL;
    PyObject *dict = NULL, *page, *number;
    size_t pages = 0;

    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "within() takes start and end");
        return NULL;
    }
    if (read_end(args[0], &start) < 0 || read_end(args[1], &end) < 0)
        return NULL;
    if (start >= end)
        return PyDict_New();
    if ((found = pages_within((Pages *)self, start, end - 1, &pages)) != NULL)
        dict = PyDict_New();
    for (size_t index = 0; dict != NULL && index < pages; index++) {
        page = PyLong_FromUnsignedLongLong(found[index]);
        number = PyLong_FromLong(rights_get(self, found[index]));
        if (page == NULL || number == NULL || PyDict_SetItem(dict, page, number) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(number);
        Py_XDECREF(page);
    }
    PyMem_Free(found);
    return dict;
}

/* --- the types ----------------------------------------------------------------------------------- */

static int
map_traverse(PyObject *self, visitproc visit, void *arg)
{
    Pages *pages = (Pages *)self;

    for (size_t place = 0; place < pages->room; place++)
        for (uint64_t left = pages->blocks[place].there; left; left &= left - 1)
            Py_VISIT(pages->blocks[place].objects[__builtin_ctzll(left)]);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int
clear(PyObject *self)
{
    map_clear(self);
    return 0;
}

static PyObject *
map_clear_method(PyObject *self, PyObject *Py_UNUSED(none))
{
    map_clear(self);
    Py_RETURN_NONE;
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

/* Python classes derive from that type, and have the collector's flag. */
static int
rights_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void
rights_dealloc(PyObject *self)
{
    Pages *pages = (Pages *)self;

    PyObject_GC_UnTrack(self);
    for (size_t place = 0; place < pages->room; place++)
        PyMem_Free(pages->blocks[place].room);
    set_dealloc(self);
}

#define FAST(function) ((PyCFunction)(void (*)(void))function)

static PyMethodDef map_methods[] = {
    {"get", FAST(map_get_method), METH_FASTCALL, "get(page, default=None): as of a dict."},
    {"pop", FAST(map_pop), METH_FASTCALL, "pop(page, default): as of a dict."},
    {"clear", map_clear_method, METH_NOARGS, "Remove all pages."},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef rights_methods[] = {
    {"discard", discard, METH_O, "Remove a page, if it is there."},
    {"within", FAST(rights_within), METH_FASTCALL,
     "within(start, end): the numbers of the pages in a range, lowest first."},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef set_methods[] = {
    {"add", set_add_method, METH_O, "Add a page."},
    {"discard", discard, METH_O, "Remove a page, if it is there."},
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
        {Py_tp_traverse, (void *)map_traverse},
        {Py_tp_clear, (void *)clear},
        {Py_tp_hash, (void *)PyObject_HashNotImplemented},
        {Py_tp_iter, (void *)iterate},
        {Py_tp_methods, map_methods},
        {Py_mp_length, (void *)pages_in},
        {Py_mp_subscript, (void *)map_subscript},
        {Py_mp_ass_subscript, (void *)map_assign},
        {Py_sq_contains, (void *)has_page},
        {0, NULL},
    };
    PyType_Slot rights_slots[] = {
        {Py_tp_dealloc, (void *)rights_dealloc},
        {Py_tp_traverse, (void *)rights_traverse},
        {Py_tp_iter, (void *)iterate},
        {Py_tp_methods, rights_methods},
        {Py_mp_length, (void *)pages_in},
        {Py_mp_subscript, (void *)rights_subscript},
        {Py_mp_ass_subscript, (void *)rights_assign},
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
    rights_map_type = make_type(module, "softsgx._speedups.RightsMap",
                                Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, rights_slots);
    page_set_type = make_type(module, "softsgx._speedups.PageSet", 0, set_slots);
    return page_map_type == NULL || rights_map_type == NULL || page_set_type == NULL ? -1 : 0;
}
