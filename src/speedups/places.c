/* Places that no page has: as the array of numbers of softsgx.paging.sealed, and where they are. */

#include "places.h"

#include <stdlib.h>

static PyObject *places_type;

Places *
as_places(PyObject *object)
{
    return is_exactly(object, places_type) ? (Places *)object : NULL;
}

int
places_append(Places *places, uint32_t number)
{
    Py_ssize_t room = places->room;
    uint32_t *numbers;

    if (places->count == room) {
        room += room / 8 + 64;
        numbers = realloc(places->numbers, (size_t)room * sizeof(uint32_t));
        if (numbers == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        places->numbers = numbers;
        places->room = room;
    }
    places->numbers[places->count++] = number;
    return 0;
}

/* Hold the buffer of one more block. */
static int
hold_block(Places *places, PyObject *block)
{
    Py_buffer *blocks = realloc(places->blocks, (size_t)(places->held + 1) * sizeof(Py_buffer));
    Py_buffer *buffer;

    if (blocks == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    places->blocks = blocks;
    buffer = &blocks[places->held];
    if (PyObject_GetBuffer(block, buffer, PyBUF_WRITABLE) < 0)
        return -1;
    if (buffer->len < (Py_ssize_t)SEALED_BLOCK_PAGES * SEALED_BYTES) {
        PyBuffer_Release(buffer);
        PyErr_SetString(PyExc_ValueError, "a block of the backing is too short");
        return -1;
    }
    places->held++;
    return 0;
}

char *
places_memory(Places *places, PyObject *blocks, int64_t number)
{
    Py_ssize_t at = (Py_ssize_t)(number / SEALED_BLOCK_PAGES);
    PyObject *block;

    while (places->held <= at) {
        if ((block = PyList_GetItem(blocks, places->held)) == NULL
            || hold_block(places, block) < 0)
            return NULL;
    }
    return (char *)places->blocks[at].buf + number % SEALED_BLOCK_PAGES * SEALED_BYTES;
}

/* --- the type ----------------------------------------------------------------------------------- */

static int
append_object(Places *places, PyObject *object)
{
    unsigned long number = PyLong_AsUnsignedLong(object);

    if (number == (unsigned long)-1 && PyErr_Occurred())
        return -1;
    if (number > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a place has more than 32 bits");
        return -1;
    }
    return places_append(places, (uint32_t)number);
}

static int
append_all(Places *places, PyObject *objects)
{
    PyObject *iterator = PyObject_GetIter(objects), *object;
    int status = iterator == NULL ? -1 : 0;

    while (status == 0 && (object = PyIter_Next(iterator)) != NULL) {
        status = append_object(places, object);
        Py_DECREF(object);
    }
    Py_XDECREF(iterator);
    return PyErr_Occurred() ? -1 : status;
}

static PyObject *
append_method(PyObject *self, PyObject *object)
{
    if (append_object((Places *)self, object) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
extend_method(PyObject *self, PyObject *objects)
{
    if (append_all((Places *)self, objects) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
pop_method(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    Places *places = (Places *)self;

    if (places->count > 0)
        return PyLong_FromUnsignedLong(places->numbers[--places->count]);
    PyErr_SetString(PyExc_IndexError, "every place is taken");
    return NULL;
}

static Py_ssize_t
length(PyObject *self)
{
    return ((Places *)self)->count;
}

static PyObject *
item(PyObject *self, Py_ssize_t number)
{
    Places *places = (Places *)self;

    if (number >= 0 && number < places->count)
        return PyLong_FromUnsignedLong(places->numbers[number]);
    PyErr_SetString(PyExc_IndexError, "no such place");
    return NULL;
}

static PyObject *
new_places(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *numbers = NULL, *self;

    if (!PyArg_ParseTuple(args, "|O", &numbers) || (keywords != NULL && PyDict_Size(keywords) > 0)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "Places() takes no names");
        return NULL;
    }
    self = PyType_GenericAlloc(type, 0);
    if (self != NULL && numbers != NULL && append_all((Places *)self, numbers) < 0)
        Py_CLEAR(self);
    return self;
}

static void
dealloc(PyObject *self)
{
    Places *places = (Places *)self;

    while (places->held > 0)
        PyBuffer_Release(&places->blocks[--places->held]);
    free(places->blocks);
    free(places->numbers);
    free_object(self);
}

static PyMethodDef methods[] = {
    {"append", append_method, METH_O, "append(place): add a place, which is taken next."},
    {"extend", extend_method, METH_O, "extend(places): append each."},
    {"pop", pop_method, METH_NOARGS, "pop(): remove and return the last place."},
    {NULL, NULL, 0, NULL},
};

int
add_places(PyObject *module)
{
    PyType_Slot slots[] = {
        {Py_tp_new, (void *)new_places},
        {Py_tp_dealloc, (void *)dealloc},
        {Py_tp_methods, methods},
        {Py_sq_length, (void *)length},
        {Py_sq_item, (void *)item},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = "softsgx._speedups.Places",
        .basicsize = sizeof(Places),
        .flags = Py_TPFLAGS_DEFAULT,
        .slots = slots,
    };

    if (places_type == NULL)
        places_type = PyType_FromSpec(&spec);
    return places_type == NULL ? -1 : PyModule_AddObjectRef(module, "Places", places_type);
}
