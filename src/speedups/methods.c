/* C functions as methods of Python classes. */

#include "driver.h"
#include "paging.h"

#include <string.h>

PyObject *readable[METHODS];

/* Mm.fault of C code, in its class. */
static PyObject *fault_descriptor;

static bool
takes(Py_ssize_t count, Py_ssize_t wanted)
{
    if (count == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", count, wanted);
    return false;
}

static PyObject *
nothing(int status)
{
    if (status < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
truth(int status)
{
    return status < 0 ? NULL : PyBool_FromLong(status);
}

static PyObject *
free_method(PyObject *self, PyObject *page)
{
    return nothing(core_free(self, page));
}

static PyObject *
mark_reclaimable_method(PyObject *self, PyObject *page)
{
    return nothing(core_mark_reclaimable(self, page));
}

/* reclaim(group=None, *, force=False) */
static PyObject *
reclaim_method(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    Py_ssize_t more = keywords == NULL ? 0 : PyTuple_Size(keywords);
    PyObject *group = count > 0 ? args[0] : Py_None, *word;
    int force = 0;

    if (count > 1)
        return takes(count, 1), NULL;
    for (Py_ssize_t index = 0; force >= 0 && index < more; index++) {
        word = PyTuple_GetItem(keywords, index);
        if (PyUnicode_CompareWithASCIIString(word, "force") == 0)
            force = PyObject_IsTrue(args[count + index]);
        else if (count == 0 && PyUnicode_CompareWithASCIIString(word, "group") == 0)
            group = args[index];
        else {
            PyErr_SetString(PyExc_TypeError, "reclaim() has no such argument");
            return NULL;
        }
    }
    return force < 0 ? NULL : core_reclaim(self, group, force);
}

/* prepare(index, *, announced=True): the reclaimer of plain classes leaves the option out. */
static PyObject *
swap_prepare_method(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    PyObject *announced;
    int64_t index;
    int truth;

    if (!takes(count, 1))
        return NULL;
    if (keywords != NULL && PyTuple_Size(keywords) > 0) {
        announced = args[1];
        truth = PyObject_IsTrue(announced);
        if (truth <= 0) {
            if (truth == 0)
                PyErr_SetString(PyExc_AssertionError, "only a defect announces evictions late");
            return NULL;
        }
    }
    index = PyLong_AsLongLong(args[0]);
    return index == -1 && PyErr_Occurred() ? NULL : swap_prepare(self, index);
}

static PyObject *
swap_write_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return takes(count, 2) ? swap_write(self, args[0], args[1]) : NULL;
}

/* load(entry, owner, *, kind="reg", cpu_node=0, group=None, claim=None) */
static PyObject *
swap_load_method(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const words[] = {"kind", "cpu_node", "group", "claim"};
    Py_ssize_t more = keywords == NULL ? 0 : PyTuple_Size(keywords);
    PyObject *values[4] = {0}, *kind, *node, *result = NULL;
    int place;

    if (!takes(count, 2))
        return NULL;
    for (Py_ssize_t index = 0; index < more; index++) {
        for (place = 0; place < 4; place++)
            if (PyUnicode_CompareWithASCIIString(PyTuple_GetItem(keywords, index), words[place])
                == 0)
                break;
        if (place == 4) {
            PyErr_SetString(PyExc_TypeError, "load() has no such argument");
            return NULL;
        }
        values[place] = args[count + index];
    }
    kind = PyUnicode_InternFromString("reg");
    node = PyLong_FromLong(0);
    if (kind != NULL && node != NULL)
        result = swap_load(self, args[0], args[1], values[0] ? values[0] : kind,
                           values[1] ? values[1] : node, values[2] ? values[2] : Py_None,
                           values[3] ? values[3] : Py_None);
    Py_XDECREF(node);
    Py_XDECREF(kind);
    return result;
}

/* fault(addr, access, task=None) */
static PyObject *
fault_method(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    Py_ssize_t all = count + (keywords == NULL ? 0 : PyTuple_Size(keywords));

    if (all > count
        && PyUnicode_CompareWithASCIIString(PyTuple_GetItem(keywords, 0), "task") != 0) {
        PyErr_SetString(PyExc_TypeError, "fault() has no such argument");
        return NULL;
    }
    if (count < 2 || !takes(all, all == 2 ? 2 : 3))
        return count < 2 ? (takes(count, 2), NULL) : NULL;
    return mm_fault(self, args[0], args[1], all == 3 ? args[2] : Py_None);
}

#define ASK(function)                                                                            \
    static PyObject *function##_method(PyObject *self, PyObject *Py_UNUSED(none))                \
    {                                                                                            \
        return truth(function(self));                                                            \
    }
ASK(page_get)
ASK(page_age)
ASK(page_prepare)
ASK(page_block)
ASK(page_write)

static PyObject *
page_put_method(PyObject *self, PyObject *Py_UNUSED(none))
{
    return nothing(page_put(self));
}


/* batch(lru, *, force=False) */
static PyObject *
reclaimer_batch_method(PyObject *self, PyObject *const *args, Py_ssize_t count,
                       PyObject *keywords)
{
    int force = 0;

    if (!takes(count, 1))
        return NULL;
    if (keywords != NULL && PyTuple_Size(keywords) > 0)
        force = PyObject_IsTrue(args[1]);
    return force < 0 ? NULL : reclaimer_batch(self, args[0], force);
}

/* _isolate(lru, count) */
static PyObject *
reclaimer_isolate_method(PyObject *Py_UNUSED(self), PyObject *const *args, Py_ssize_t count)
{
    Py_ssize_t wanted;

    if (!takes(count, 2))
        return NULL;
    wanted = PyLong_AsSsize_t(args[1]);
    return wanted == -1 && PyErr_Occurred() ? NULL : reclaimer_isolate(args[0], wanted);
}

/* _prepare(lru, pages, *, force) */
static PyObject *
reclaimer_prepare_method(PyObject *self, PyObject *const *args, Py_ssize_t count,
                         PyObject *keywords)
{
    int force;

    if (!takes(count, 2) || !takes(keywords == NULL ? 0 : PyTuple_Size(keywords), 1))
        return NULL;
    force = PyObject_IsTrue(args[2]);
    return force < 0 ? NULL : reclaimer_prepare(self, args[0], args[1], force);
}

static PyObject *
reclaimer_block_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return takes(count, 2) ? reclaimer_block(self, args[0], args[1]) : NULL;
}

static PyObject *
reclaimer_write_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return takes(count, 2) ? reclaimer_write(self, args[0], args[1]) : NULL;
}

#define FUNCTION(function) (PyCFunction)(void (*)(void))(function)

/* The class's name, the method, and the readable one. */
static struct {
    const char *owner;
    PyMethodDef definition;
    enum method method;
} methods[] = {
    {"CompiledCore", {"free", free_method, METH_O, "As EpcCore.free."}, CORE_FREE},
    {"CompiledCore",
     {"mark_reclaimable", mark_reclaimable_method, METH_O, "As EpcCore.mark_reclaimable."},
     CORE_MARK_RECLAIMABLE},
    {"CompiledCore",
     {"reclaim", FUNCTION(reclaim_method), METH_FASTCALL | METH_KEYWORDS, "As EpcCore.reclaim."},
     CORE_RECLAIM},
    {"CompiledSwap",
     {"prepare", FUNCTION(swap_prepare_method), METH_FASTCALL | METH_KEYWORDS,
      "As EnclaveSwap.prepare."},
     SWAP_PREPARE},
    {"CompiledSwap",
     {"write", FUNCTION(swap_write_method), METH_FASTCALL, "As EnclaveSwap.write."},
     SWAP_WRITE},
    {"CompiledSwap",
     {"load", FUNCTION(swap_load_method), METH_FASTCALL | METH_KEYWORDS, "As EnclaveSwap.load."},
     SWAP_LOAD},
    {"Mm", {"fault", FUNCTION(fault_method), METH_FASTCALL | METH_KEYWORDS, "As Mm.fault."},
     MM_FAULT},
    {"CompiledPage", {"get", page_get_method, METH_NOARGS, "As EnclavePage.get."}, PAGE_GET},
    {"CompiledPage", {"put", page_put_method, METH_NOARGS, "As EnclavePage.put."}, PAGE_PUT},
    {"CompiledPage", {"age", page_age_method, METH_NOARGS, "As EnclavePage.age."}, PAGE_AGE},
    {"CompiledPage",
     {"prepare", page_prepare_method, METH_NOARGS, "As EnclavePage.prepare."},
     PAGE_PREPARE},
    {"CompiledPage", {"block", page_block_method, METH_NOARGS, "As EnclavePage.block."},
     PAGE_BLOCK},
    {"CompiledPage", {"write", page_write_method, METH_NOARGS, "As EnclavePage.write."},
     PAGE_WRITE},
    {"CompiledReclaimer",
     {"batch", FUNCTION(reclaimer_batch_method), METH_FASTCALL | METH_KEYWORDS,
      "As Reclaimer.batch."},
     RECLAIMER_BATCH},
    {"CompiledReclaimer",
     {"_isolate", FUNCTION(reclaimer_isolate_method), METH_FASTCALL, "As Reclaimer._isolate."},
     RECLAIMER_ISOLATE},
    {"CompiledReclaimer",
     {"_prepare", FUNCTION(reclaimer_prepare_method), METH_FASTCALL | METH_KEYWORDS,
      "As Reclaimer._prepare."},
     RECLAIMER_PREPARE},
    {"CompiledReclaimer",
     {"_block", FUNCTION(reclaimer_block_method), METH_FASTCALL, "As Reclaimer._block."},
     RECLAIMER_BLOCK},
    {"CompiledReclaimer",
     {"_write", FUNCTION(reclaimer_write_method), METH_FASTCALL, "As Reclaimer._write."},
     RECLAIMER_WRITE},
};

/* add_methods(class): as far as C code has methods of a class of that name. */
static PyObject *
add_methods_to(PyObject *Py_UNUSED(module), PyObject *type)
{
    PyObject *name, *descriptor, *inherited;
    int status = 0;

    if (!PyType_Check(type)) {
        PyErr_SetString(PyExc_TypeError, "methods are added to classes");
        return NULL;
    }
    name = PyObject_GetAttrString(type, "__name__");
    if (name == NULL)
        return NULL;
    for (size_t index = 0; status == 0 && index < sizeof methods / sizeof *methods; index++) {
        if (PyUnicode_CompareWithASCIIString(name, methods[index].owner) != 0)
            continue;
        inherited = PyObject_GetAttrString(type, methods[index].definition.ml_name);
        descriptor = PyDescr_NewMethod((PyTypeObject *)type, &methods[index].definition);
        status = inherited == NULL || descriptor == NULL
            ? -1
            : PyObject_SetAttrString(type, methods[index].definition.ml_name, descriptor);
        if (status == 0 && methods[index].method == MM_FAULT) {
            Py_INCREF(descriptor);
            replace(&fault_descriptor, descriptor);
        }
        Py_XDECREF(descriptor);
        if (status == 0)
            replace(&readable[methods[index].method], inherited);
        else
            Py_XDECREF(inherited);
    }
    Py_DECREF(name);
    return nothing(status);
}

int
has_mm_fault(PyObject *mm)
{
    PyObject *method;

    if (fault_descriptor == NULL || Py_TYPE(mm) != record_types[KIND_Mm])
        return 0;
    method = PyObject_GetAttr((PyObject *)Py_TYPE(mm), names.fault);
    Py_XDECREF(method);
    return method == NULL ? -1 : method == fault_descriptor;
}

/* fall_back(function): what handle() calls where a fault is not plain. */
static PyObject *
fall_back(PyObject *Py_UNUSED(module), PyObject *function)
{
    Py_INCREF(function);
    replace(&readable[HANDLE], function);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"add_methods", add_methods_to, METH_O,
     "add_methods(class): add the methods for a class of that name; those it has are used where "
     "the compiled ones do not apply."},
    {"fall_back", fall_back, METH_O, "fall_back(function): what handle() uses otherwise."},
    {"handle", FUNCTION(handle), METH_FASTCALL,
     "handle(enclave, mm, vma, linaddr, task): as softsgx.driver.fault.handle."},
    {NULL, NULL, 0, NULL},
};

int
add_methods(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
