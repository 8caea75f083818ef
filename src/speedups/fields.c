/* The types of the structures of fields.h. */

#include "speedups.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>

/* --- fields that are counts --------------------------------------------------------------------- */

/* Not T_LONGLONG: that stores -1 where the value is none that it can store. */
static PyObject *
get_count(PyObject *self, void *at)
{
    return PyLong_FromLongLong(*(int64_t *)((char *)self + (size_t)at));
}

static int
set_count(PyObject *self, PyObject *value, void *at)
{
    int64_t count;

    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "a count cannot be deleted");
        return -1;
    }
    count = PyLong_AsLongLong(value);
    if (count == -1 && PyErr_Occurred())
        return -1;
    *(int64_t *)((char *)self + (size_t)at) = count;
    return 0;
}

/* --- fields that are addresses ------------------------------------------------------------------- */

static PyObject *
get_address_field(PyObject *self, void *at)
{
    return PyLong_FromUnsignedLongLong(*(uint64_t *)((char *)self + (size_t)at));
}

static int
set_address_field(PyObject *self, PyObject *value, void *at)
{
    uint64_t address;

    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "an address cannot be deleted");
        return -1;
    }
    address = PyLong_AsUnsignedLongLong(value);
    if (address == (uint64_t)-1 && PyErr_Occurred())
        return -1;
    *(uint64_t *)((char *)self + (size_t)at) = address;
    return 0;
}

/* --- fields that are bitmaps -------------------------------------------------------------------- */

#define BITMAP_BYTES (BITMAP_WORDS * (Py_ssize_t)sizeof(uint64_t))

static PyObject *
get_bitmap(PyObject *self, void *at)
{
    PyObject *bytes = PyBytes_FromStringAndSize((char *)self + (size_t)at, BITMAP_BYTES);
    PyObject *number = bytes == NULL ? NULL : CALL(&PyLong_Type, from_bytes, bytes, names.little, NULL);

    Py_XDECREF(bytes);
    return number;
}

static int
set_bitmap(PyObject *self, PyObject *value, void *at)
{
    PyObject *size, *bytes;
    int status = -1;

    if (value == NULL || !PyLong_Check(value)) {
        PyErr_SetString(PyExc_TypeError, "a bitmap is an integer");
        return -1;
    }
    size = PyLong_FromSsize_t(BITMAP_BYTES);
    bytes = size == NULL ? NULL : CALL(value, to_bytes, size, names.little, NULL);
    Py_XDECREF(size);
    if (bytes == NULL)
        return -1;
    if (PyBytes_Check(bytes) && PyBytes_Size(bytes) == BITMAP_BYTES) {
        memcpy((char *)self + (size_t)at, PyBytes_AsString(bytes), (size_t)BITMAP_BYTES);
        status = 0;
    }
    else /* to_bytes() of a derived class */
        PyErr_SetString(PyExc_TypeError, "the bytes of a bitmap are 64");
    Py_DECREF(bytes);
    return status;
}

/* --- fields that are numbers of one byte --------------------------------------------------------- */

static PyObject *
get_byte(PyObject *self, void *at)
{
    return PyLong_FromLong(*((uint8_t *)self + (size_t)at));
}

static int
set_byte(PyObject *self, PyObject *value, void *at)
{
    long number;

    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "a number cannot be deleted");
        return -1;
    }
    number = PyLong_AsLong(value);
    if (number == -1 && PyErr_Occurred())
        return -1;
    return put_byte((uint8_t *)self + (size_t)at, number);
}

/* --- one type a structure ----------------------------------------------------------------------- */

struct structure {
    const char *name; /* with the module's */
    size_t size;
    const char *const *fields;
    PyGetSetDef *numbers;
    PyMemberDef *members;
    traverseproc traverse;
    inquiry clear;
    destructor dealloc;
    PyObject *type; /* made when it is first asked for */
};

#define NOTHING(name)
#define TEXT(name) #name,
#define COUNT(name) {#name, get_count, set_count, NULL, (void *)offsetof(HOLDER, name)},
#define ADDRESS(name)                                                                            \
    {#name, get_address_field, set_address_field, NULL, (void *)offsetof(HOLDER, name)},
#define BITMAP(name) {#name, get_bitmap, set_bitmap, NULL, (void *)offsetof(HOLDER, name)},
#define BYTE(name) {#name, get_byte, set_byte, NULL, (void *)offsetof(HOLDER, name)},
#define OBJECT(name) {#name, T_OBJECT_EX, offsetof(HOLDER, name), 0, NULL},
#define FLAG(name) {#name, T_BOOL, offsetof(HOLDER, name), 0, NULL},
#define VISIT(name) Py_VISIT(record->name);
#define CLEAR(name) Py_CLEAR(record->name);

/* A reference that Python code does not see, or NULL: a record of that kind has none. */
static inline PyObject **
hidden_entry(SgxEpcPage *page)
{
    return &page->entry;
}

static inline PyObject **
no_hidden(void *Py_UNUSED(record))
{
    return NULL;
}

#define HIDDEN(record) _Generic((record), SgxEpcPage *: hidden_entry, default: no_hidden)(record)

/* The collector knows of each instance: Python gives all classes that it makes that flag. */
#define DEFINE(kind, fields)                                                                     \
    static int kind##_traverse(PyObject *self, visitproc visit, void *arg)                       \
    {                                                                                            \
        kind *record = (kind *)self;                                                             \
        PyObject **hidden = HIDDEN(record);                                                      \
                                                                                                 \
        if (hidden != NULL)                                                                      \
            Py_VISIT(*hidden);                                                                   \
        fields(NOTHING, VISIT, NOTHING, NOTHING, NOTHING, NOTHING)                               \
        Py_VISIT(Py_TYPE(self));                                                                 \
        return 0;                                                                                \
    }                                                                                            \
                                                                                                 \
    static int kind##_clear(PyObject *self)                                                      \
    {                                                                                            \
        kind *record = (kind *)self;                                                             \
        PyObject **hidden = HIDDEN(record);                                                      \
                                                                                                 \
        if (hidden != NULL)                                                                      \
            Py_CLEAR(*hidden);                                                                   \
        fields(NOTHING, CLEAR, NOTHING, NOTHING, NOTHING, NOTHING)                               \
        return 0;                                                                                \
    }                                                                                            \
                                                                                                 \
    static void kind##_dealloc(PyObject *self)                                                   \
    {                                                                                            \
        PyObject_GC_UnTrack(self);                                                               \
        kind##_clear(self);                                                                      \
        free_object(self);                                                                       \
    }                                                                                            \
                                                                                                 \
    static struct structure *kind##_structure(void)                                              \
    {                                                                                            \
        typedef kind HOLDER;                                                                     \
        static const char *const names[] = {fields(TEXT, TEXT, TEXT, TEXT, TEXT, TEXT) NULL};    \
        static PyGetSetDef numbers[] = {                                                         \
            fields(COUNT, NOTHING, BITMAP, ADDRESS, NOTHING, BYTE) {NULL}                        \
        };                                                                                       \
        static PyMemberDef members[] = {                                                         \
            fields(NOTHING, OBJECT, NOTHING, NOTHING, FLAG, NOTHING) {NULL}                      \
        };                                                                                       \
        static struct structure one = {                                                          \
            "softsgx._speedups." #kind, sizeof(kind), names, numbers, members,                   \
            kind##_traverse, kind##_clear, kind##_dealloc, NULL,                                 \
        };                                                                                       \
                                                                                                 \
        return &one;                                                                             \
    }
STRUCTURES(DEFINE)

static PyObject *
tuple_of(const char *const *texts)
{
    PyObject *list = PyList_New(0), *text, *tuple;
    int status = list == NULL ? -1 : 0;

    for (; status == 0 && *texts != NULL; texts++) {
        text = PyUnicode_InternFromString(*texts);
        status = text == NULL ? -1 : PyList_Append(list, text);
        Py_XDECREF(text);
    }
    tuple = status < 0 ? NULL : PyList_AsTuple(list);
    Py_XDECREF(list);
    return tuple;
}

/* __slots__ are the names, as in a class of Python: copies and pickles are made by them. */
static PyObject *
make(const struct structure *structure)
{
    PyType_Slot slots[] = {
        {Py_tp_getset, structure->numbers},
        {Py_tp_members, structure->members},
        {Py_tp_dealloc, (void *)structure->dealloc},
        {Py_tp_traverse, (void *)structure->traverse},
        {Py_tp_clear, (void *)structure->clear},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = structure->name,
        .basicsize = (int)structure->size,
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec), *names = type == NULL ? NULL : tuple_of(structure->fields);

    if (type == NULL && !PyErr_Occurred())
        PyErr_NoMemory(); // Python 3.11 does not say so everywhere
    if (names == NULL || PyObject_SetAttrString(type, "__slots__", names) < 0)
        Py_CLEAR(type);
    Py_XDECREF(names);
    return type;
}

static struct structure *
find(const char *name)
{
#define CASE(kind, fields)                                                                       \
    if (strcmp(name, #kind) == 0)                                                                \
        return kind##_structure();
    STRUCTURES(CASE)
    return NULL;
}

PyObject *
structure_type(const char *name)
{
    struct structure *found = find(name);

    if (found == NULL)
        return NULL;
    if (found->type == NULL)
        found->type = make(found);
    return found->type;
}

static PyObject *
fields(PyObject *Py_UNUSED(module), PyObject *name)
{
    const char *text = PyUnicode_AsUTF8AndSize(name, NULL);
    PyObject *type = text == NULL ? NULL : structure_type(text);

    if (type == NULL && PyErr_Occurred())
        return NULL;
    if (type == NULL)
        Py_RETURN_NONE;
    Py_INCREF(type);
    return type;
}

static PyMethodDef functions[] = {
    {"fields", fields, METH_O,
     "fields(name): the type of a structure of that name, which has its fields; None: there is none."},
    {NULL, NULL, 0, NULL},
};

int
add_fields(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
