/* The module softsgx._speedups: second implementations of what is hot. */

#include "speedups.h"

/* Python code and C code that do not fit each other do not meet: softsgx.compiled compares it. */
#define INTERFACE 1

static int
execute(PyObject *module)
{
    if (PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0
        || PyModule_AddStringConstant(module, "SOURCES", SPEEDUPS_SOURCES) < 0)
        return -1;
    return add_headers(module);
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

PyMODINIT_FUNC
PyInit__speedups(void)
{
    return PyModuleDef_Init(&definition);
}
