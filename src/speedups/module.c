/* The module softsgx._speedups: second implementations of what is hot. */

#include "speedups.h"

/* Python code and C code that do not fit each other do not meet: softsgx.compiled compares it. */
#define INTERFACE 15

int
read_words(const char *name, PyObject *const *args, Py_ssize_t count, uint64_t *words,
           Py_ssize_t wanted)
{
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd integers", name, wanted);
        return -1;
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        words[index] = PyLong_AsUnsignedLongLong(args[index]);
        if (words[index] == (uint64_t)-1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int
execute(PyObject *module)
{
    if (PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0
        || PyModule_AddStringConstant(module, "SOURCES", SPEEDUPS_SOURCES) < 0
        || add_instructions(module) < 0)
        return -1;
    if (add_records(module) < 0 || add_fields(module) < 0 || add_leaves(module) < 0 || add_cipher(module) < 0 || add_numbers(module) < 0 || add_places(module) < 0
        || add_versions(module) < 0
        || add_hiding(module) < 0
        || add_methods(module) < 0 || add_pages(module) < 0 || add_plain_faults(module) < 0 || add_stops(module) < 0
        || add_virtual_exit(module) < 0 || add_page_lists(module) < 0
        || add_enclave_pages(module) < 0 || add_tallies(module) < 0)
        return -1;
    if (add_page_maps(module) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "softsgx._speedups",
    .m_doc = "Second implementations of what is hot.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__speedups(void);

PyMODINIT_FUNC
PyInit__speedups(void)
{
    return PyModuleDef_Init(&definition);
}
