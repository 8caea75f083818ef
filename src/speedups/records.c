/* Records of Python, names of attributes, and objects that Python code gives. */

#include "speedups.h"

#include <string.h>

PyTypeObject *record_types[KINDS], *derived_types[KINDS];
struct names names;

#define ANSWERS 4 /* of has_method_of() */
struct given given;

#define TEXT(name) #name,
#define FIELDS(type, fields) static const char *const type##_fields[] = {fields(TEXT) NULL};
RECORDS(FIELDS)
#undef FIELDS
#define FIELDS(type, fields, base) static const char *const type##_fields[] = {fields(TEXT) NULL};
DERIVED(FIELDS)
#undef FIELDS

/* Without fields: it derives from the type of that structure. */
static const struct {
    const char *name;
    const char *const *fields;
    size_t size;
} layouts[KINDS] = {
#define LAYOUT(type, ...) {#type, type##_fields, sizeof(type)},
#define STRUCTURED(type, fields) {#type, NULL, sizeof(type)},
    RECORDS(LAYOUT) DERIVED(LAYOUT) STRUCTURES(STRUCTURED)
#undef STRUCTURED
#undef LAYOUT
};

/* --- integers ----------------------------------------------------------------------------------- */

/* In the stable ABI PyLong_Check is a call. */
static inline bool
is_integer(PyObject *field)
{
    return field != NULL && (Py_IS_TYPE(field, &PyLong_Type) || PyLong_Check(field));
}

bool
read_integer(PyObject *field, int64_t *value)
{
    int overflow;

    if (!is_integer(field))
        return false;
    *value = PyLong_AsLongLongAndOverflow(field, &overflow);
    return !overflow;
}

bool
read_address(PyObject *field, uint64_t *value)
{
    int overflow;

    if (!is_integer(field))
        return false;
    /* Python converts to an unsigned integer in a loop over bytes. */
    *value = (uint64_t)PyLong_AsLongLongAndOverflow(field, &overflow);
    if (overflow == 0)
        return (int64_t)*value >= 0;
    *value = PyLong_AsUnsignedLongLong(field);
    if (*value != (uint64_t)-1 || !PyErr_Occurred())
        return true;
    PyErr_Clear();
    return false;
}

int
put_object(PyObject **field, int64_t value)
{
    PyObject *number = PyLong_FromLongLong(value), *old = *field;

    if (number == NULL)
        return -1;
    *field = number;
    Py_XDECREF(old);
    return 0;
}

static int
no_integer(void)
{
    PyErr_SetString(PyExc_TypeError, "a count is no integer of 64 bits");
    return -1;
}

int
no_count(void)
{
    PyErr_SetString(PyExc_OverflowError, "a count is beyond 64 bits");
    return -1;
}

int
put_byte(uint8_t *field, int64_t value)
{
    if (value < 0 || value > UINT8_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a number is not from 0 to 255");
        return -1;
    }
    *field = (uint8_t)value;
    return 0;
}

int
add_to_object(PyObject **field, int64_t change)
{
    int64_t value;

    if (!read_integer(*field, &value))
        return no_integer();
    return add_to_count(&value, change) < 0 ? -1 : put_object(field, value);
}

int
get_integer(PyObject *object, PyObject *name, int64_t *value)
{
    PyObject *found = PyObject_GetAttr(object, name);
    int status = 0;

    if (found == NULL)
        return -1;
    if (!integer(found, value))
        status = no_integer();
    Py_DECREF(found);
    return status;
}

int
get_address(PyObject *object, PyObject *name, uint64_t *value)
{
    PyObject *found = PyObject_GetAttr(object, name);
    int status = 0;

    if (found == NULL)
        return -1;
    if (!address(found, value)) {
        PyErr_SetString(PyExc_TypeError, "an address is no integer of 64 bits");
        status = -1;
    }
    Py_DECREF(found);
    return status;
}

int
put_integer(PyObject *object, PyObject *name, int64_t value)
{
    PyObject *number = PyLong_FromLongLong(value);
    int status;

    if (number == NULL)
        return -1;
    status = PyObject_SetAttr(object, name, number);
    Py_DECREF(number);
    return status;
}

int
add_integer(PyObject *object, PyObject *name, int64_t change)
{
    int64_t value;

    if (get_integer(object, name, &value) < 0)
        return -1;
    if (__builtin_add_overflow(value, change, &value))
        return no_count();
    return put_integer(object, name, value);
}

int
get_truth(PyObject *object, PyObject *name)
{
    PyObject *found = PyObject_GetAttr(object, name);
    int truth;

    if (found == NULL)
        return -1;
    truth = PyObject_IsTrue(found);
    Py_DECREF(found);
    return truth;
}

PyObject *
bound_to(PyObject *method, PyObject *function)
{
    static PyObject *func, *self;
    PyObject *found, *object = NULL;

    if ((func == NULL && (func = PyUnicode_InternFromString("__func__")) == NULL)
        || (self == NULL && (self = PyUnicode_InternFromString("__self__")) == NULL))
        return NULL;
    found = PyObject_GetAttr(method, func);
    if (found != NULL && found == function)
        object = PyObject_GetAttr(method, self);
    else if (found == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    Py_XDECREF(found);
    return object;
}

int
has(PyObject *object, PyObject *name, PyObject *value)
{
    PyObject *found = PyObject_GetAttr(object, name);

    Py_XDECREF(found);
    return found == NULL ? -1 : found == value;
}

int
any_in(PyObject *container)
{
    Py_ssize_t size = PyObject_Size(container);

    return size < 0 ? -1 : size > 0;
}

int
has_any(PyObject *object, PyObject *name)
{
    PyObject *container = PyObject_GetAttr(object, name);
    int any = container == NULL ? -1 : any_in(container);

    Py_XDECREF(container);
    return any;
}

int
effect(PyObject *result)
{
    if (result == NULL)
        return -1;
    Py_DECREF(result);
    return 0;
}

PyObject *
call_with(PyObject *object, PyObject *name, PyObject *number, PyObject *other)
{
    PyObject *result = number == NULL ? NULL
                                      : PyObject_CallMethodObjArgs(object, name, number, other, NULL);

    Py_XDECREF(number);
    return result;
}

int
is_so(PyObject *result)
{
    int truth = result == NULL ? -1 : PyObject_IsTrue(result);

    Py_XDECREF(result);
    return truth;
}

/* What was asked last; a class keeps its methods. */
static struct answer {
    PyObject *policy_type, *type, *name;
    int same;
} answers[ANSWERS];

int
has_method_of(PyObject *policy, PyObject *type, PyObject *name)
{
    PyObject *policy_type = (PyObject *)Py_TYPE(policy), *mine, *its;
    static unsigned next;
    struct answer *answer;

    for (answer = answers; answer < answers + ANSWERS; answer++)
        if (answer->policy_type == policy_type && answer->type == type && answer->name == name)
            return answer->same;
    mine = PyObject_GetAttr(policy_type, name);
    its = PyObject_GetAttr(type, name);
    if (mine != NULL && its != NULL) {
        answer = &answers[next++ % ANSWERS];
        Py_INCREF(policy_type);
        replace(&answer->policy_type, policy_type);
        Py_INCREF(type);
        replace(&answer->type, type);
        answer->name = name;
        answer->same = mine == its;
    }
    Py_XDECREF(its);
    Py_XDECREF(mine);
    return mine == NULL || its == NULL ? -1 : mine == its;
}

bool
is_derived(PyTypeObject *type, enum kind kind)
{
    if (record_types[kind] == NULL || !PyType_IsSubtype(type, record_types[kind]))
        return false;
    /* A type that is kept has an address of its own. */
    Py_INCREF((PyObject *)type);
    replace((PyObject **)&derived_types[kind], (PyObject *)type);
    return true;
}

void
free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* --- binding ------------------------------------------------------------------------------------ */

/* Whether each field of an instance is where the structure has it, from the first one on: 0, 1, or -1
 * with an error. */
static int
fits(PyObject *instance, size_t first, const char *const *fields)
{
    PyObject *mark = PyLong_FromLong(0x5f3759df), **places;
    int status = 1;

    if (mark == NULL)
        return -1;
    places = (PyObject **)((char *)instance + first);
    for (Py_ssize_t index = 0; fields[index] != NULL && status == 1; index++) {
        if (places[index] != NULL)
            status = 0;
        else if (PyObject_SetAttrString(instance, fields[index], mark) < 0)
            status = -1;
        else if (places[index] != mark)
            status = 0;
    }
    Py_DECREF(mark);
    return status;
}

/* Whether instances of a class are laid out as records of a kind: 0, 1, or -1 with an error. */
static int
is_laid_out(PyTypeObject *type, int kind)
{
    const char *const *fields = layouts[kind].fields;
    PyObject *instance, *size, *structure;
    size_t count = 0;
    int status;

    if (fields == NULL) {
        structure = structure_type(layouts[kind].name);
        return structure == NULL ? -1 : PyType_IsSubtype(type, (PyTypeObject *)structure);
    }
    while (fields[count] != NULL)
        count++;
    size = PyObject_GetAttrString((PyObject *)type, "__basicsize__");
    if (size == NULL)
        return -1;
    status = PyLong_AsSize_t(size) == layouts[kind].size;
    Py_DECREF(size);
    if (status == 0)
        return 0;
    instance = PyType_GenericAlloc(type, 0);
    if (instance == NULL)
        return -1;
    status = fits(instance, layouts[kind].size - count * sizeof(PyObject *), fields);
    Py_DECREF(instance);
    return status;
}

static PyObject *
bind(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name;
    PyObject *type;
    int status;

    if (!PyArg_ParseTuple(args, "sO!", &name, &PyType_Type, &type))
        return NULL;
    for (int kind = 0; kind < KINDS; kind++) {
        if (strcmp(layouts[kind].name, name) != 0)
            continue;
        status = is_laid_out((PyTypeObject *)type, kind);
        if (status < 0)
            return NULL;
        if (status) {
            Py_INCREF(type);
            replace((PyObject **)&record_types[kind], type);
            Py_CLEAR(derived_types[kind]);
        }
        return PyBool_FromLong(status);
    }
    PyErr_Format(PyExc_ValueError, "no record %s", name);
    return NULL;
}

static PyObject *
give(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name;
    PyObject *object, **place = (PyObject **)&given;
    static const char *const known[] = {GIVEN(TEXT) NULL};

    if (!PyArg_ParseTuple(args, "sO", &name, &object))
        return NULL;
    for (int index = 0; known[index] != NULL; index++) {
        if (strcmp(known[index], name) == 0) {
            Py_INCREF(object);
            replace(&place[index], object);
            Py_RETURN_NONE;
        }
    }
    PyErr_Format(PyExc_ValueError, "nothing here uses %s", name);
    return NULL;
}

static PyMethodDef functions[] = {
    {"bind", bind, METH_VARARGS,
     "bind(name, class): read and write instances directly; False: they are laid out otherwise."},
    {"give", give, METH_VARARGS, "give(name, object): a class or an object that C code uses."},
    {NULL, NULL, 0, NULL},
};

int
add_records(PyObject *module)
{
    static const char *const texts[] = {NAMES(TEXT) NULL};
    PyObject **place = (PyObject **)&names;

    for (int index = 0; texts[index] != NULL; index++) {
        if (place[index] == NULL)
            place[index] = PyUnicode_InternFromString(texts[index]);
        if (place[index] == NULL)
            return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
