/* Lists of EPC pages, oldest first: as softsgx.paging.page_list.  The links are in the pages, so that
 * a list takes no memory for them; a page is on one list at most. */

#include "page_list.h"

#include <stddef.h>

_Static_assert(offsetof(SgxEpcPage, before) == offsetof(Linked, before)
                   && offsetof(SgxEpcPage, after) == offsetof(Linked, after)
                   && offsetof(SgxEpcPage, list) == offsetof(Linked, list),
               "a page begins with its links");
_Static_assert(offsetof(VaPage, before) == offsetof(Linked, before)
                   && offsetof(VaPage, after) == offsetof(Linked, after)
                   && offsetof(VaPage, list) == offsetof(Linked, list),
               "a VA page begins with its links");

static PyTypeObject *list_type, *va_list_type, *iterator_type;

/* --- steps -------------------------------------------------------------------------------------- */

/* Link a page behind the last one; the list takes over a reference. */
static void
link_last(PageList *list, Linked *page)
{
    page->list = list;
    page->before = list->last;
    page->after = NULL;
    *(list->last == NULL ? &list->first : &list->last->after) = page;
    list->last = page;
    list->count++;
    list->changes++;
}

/* The same before the first one. */
static void
link_first(PageList *list, Linked *page)
{
    page->list = list;
    page->before = NULL;
    page->after = list->first;
    *(list->first == NULL ? &list->last : &list->first->before) = page;
    list->first = page;
    list->count++;
    list->changes++;
}

/* Unlink a page of the list; the caller takes over the list's reference. */
static void
unlink_page(PageList *list, Linked *page)
{
    *(page->before == NULL ? &list->first : &page->before->after) = page->after;
    *(page->after == NULL ? &list->last : &page->after->before) = page->before;
    page->before = page->after = NULL;
    page->list = NULL;
    list->count--;
    list->changes++;
}

static int
append_linked(PageList *list, Linked *page)
{
    if (page->list != NULL) {
        PyErr_Format(PyExc_AssertionError, "%R is on a list already", page);
        return -1;
    }
    Py_INCREF((PyObject *)page);
    link_last(list, page);
    return 0;
}

int
list_append(PageList *list, SgxEpcPage *page)
{
    return append_linked(list, (Linked *)page);
}

SgxEpcPage *
list_popleft(PageList *list)
{
    Linked *page = list->first;

    if (page != NULL)
        unlink_page(list, page);
    return (SgxEpcPage *)page;
}

PageList *
page_list(PyObject *object)
{
    if (object != NULL && !Py_IS_TYPE(object, list_type)) {
        PyErr_SetString(PyExc_TypeError, "a list of EPC pages is no PageList");
        Py_CLEAR(object);
    }
    return (PageList *)object;
}

VaPage *
first_va_page(PyObject *object)
{
    return is_exactly(object, (PyObject *)va_list_type) ? (VaPage *)((PageList *)object)->first
                                                        : NULL;
}

int
move_va_page(PyObject *object, VaPage *page, bool last)
{
    PageList *list = (PageList *)object;

    if (!is_exactly(object, (PyObject *)va_list_type) || page->list != list) {
        PyErr_SetObject(PyExc_KeyError, (PyObject *)page);
        return -1;
    }
    unlink_page(list, (Linked *)page);
    (last ? link_last : link_first)(list, (Linked *)page);
    return 0;
}

PageList *
listed_pages(PyObject *lru)
{
    return page_list(GETF(Lru, lru, pages));
}

/* --- the type ----------------------------------------------------------------------------------- */

/* The page, borrowed; NULL with an error: it is none that the list may have. */
static Linked *
linked(PyObject *self, PyObject *object)
{
    bool of_va = Py_IS_TYPE(self, va_list_type);
    PyTypeObject *type = (PyTypeObject *)structure_type(of_va ? "VaPage" : "SgxEpcPage");

    if (type == NULL)
        return NULL;
    if (Py_IS_TYPE(object, type) || PyType_IsSubtype(Py_TYPE(object), type))
        return (Linked *)object;
    PyErr_Format(PyExc_TypeError, "%R is no %s page", object, of_va ? "VA" : "EPC");
    return NULL;
}

/* The page, borrowed; NULL with an error: it is not on this list. */
static Linked *
member(PyObject *self, PyObject *object)
{
    Linked *page = linked(self, object);

    if (page == NULL || page->list == (PageList *)self)
        return page;
    PyErr_SetObject(PyExc_KeyError, object);
    return NULL;
}

static int clear(PyObject *self);

static PyObject *
append_method(PyObject *self, PyObject *object)
{
    Linked *page = linked(self, object);

    if (page == NULL || append_linked((PageList *)self, page) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
popleft_method(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    SgxEpcPage *page = list_popleft((PageList *)self);

    if (page == NULL)
        PyErr_SetString(PyExc_IndexError, "no page is on the list");
    return (PyObject *)page;
}

static int
remove_one(PyObject *self, PyObject *object)
{
    Linked *page = member(self, object);

    if (page == NULL)
        return -1;
    unlink_page((PageList *)self, page);
    Py_DECREF((PyObject *)page);
    return 0;
}

static PyObject *
remove_method(PyObject *self, PyObject *object)
{
    if (remove_one(self, object) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
remove_all_method(PyObject *self, PyObject *objects)
{
    Py_ssize_t count = PyList_Size(objects);
    int status = count < 0 ? -1 : 0;

    for (Py_ssize_t index = 0; status == 0 && index < count; index++) {
        PyObject *object = PySequence_GetItem(objects, index);

        status = object == NULL ? -1 : remove_one(self, object);
        Py_XDECREF(object);
    }
    if (status < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
move_to_end_method(PyObject *self, PyObject *object)
{
    Linked *page = member(self, object);

    if (page == NULL)
        return NULL;
    unlink_page((PageList *)self, page);
    link_last((PageList *)self, page);
    Py_RETURN_NONE;
}

static PyObject *
move_method(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *words[] = {"page", "last", NULL};
    PyObject *object;
    Linked *page;
    int last = 1;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|p", words, &object, &last)
        || (page = member(self, object)) == NULL
        || move_va_page(self, (VaPage *)page, last != 0) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
clear_method(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    clear(self);
    Py_RETURN_NONE;
}

/* An iterator of the pages as they are now, the last one first. */
static PyObject *
reversed_method(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    PyObject *pages = PySequence_List(self), *iterator = NULL;

    if (pages != NULL && PyList_Reverse(pages) == 0)
        iterator = PyObject_GetIter(pages);
    Py_XDECREF(pages);
    return iterator;
}

static Py_ssize_t
length(PyObject *self)
{
    return ((PageList *)self)->count;
}

static int
contains(PyObject *self, PyObject *object)
{
    Linked *page = linked(self, object);

    if (page != NULL)
        return page->list == (PageList *)self;
    if (!PyErr_ExceptionMatches(PyExc_TypeError))
        return -1;
    PyErr_Clear();
    return 0;
}

/* list[number]: callers read the first page so. */
static PyObject *
item(PyObject *self, Py_ssize_t number)
{
    Linked *page = number < 0 ? NULL : ((PageList *)self)->first;

    for (; page != NULL && number > 0; number--)
        page = page->after;
    if (page == NULL)
        PyErr_SetString(PyExc_IndexError, "no such page is on the list");
    Py_XINCREF((PyObject *)page);
    return (PyObject *)page;
}

static PyObject *
new_list(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    if (PyTuple_Size(args) > 0 || (keywords != NULL && PyDict_Size(keywords) > 0)) {
        PyErr_SetString(PyExc_TypeError, "a list of pages takes no arguments");
        return NULL;
    }
    return PyType_GenericAlloc(type, 0);
}

static int
traverse(PyObject *self, visitproc visit, void *arg)
{
    for (Linked *page = ((PageList *)self)->first; page != NULL; page = page->after)
        Py_VISIT(page);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int
clear(PyObject *self)
{
    SgxEpcPage *page;

    while ((page = list_popleft((PageList *)self)) != NULL)
        RELEASE(page);
    return 0;
}

static void
dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    free_object(self);
}

/* --- iteration ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PageList *list;
    Linked *next;
    uint64_t changes;
} Iterator;

static PyObject *
iterate(PyObject *self)
{
    Iterator *iterator = (Iterator *)PyType_GenericAlloc(iterator_type, 0);

    if (iterator == NULL)
        return NULL;
    Py_INCREF(self);
    iterator->list = (PageList *)self;
    iterator->next = iterator->list->first;
    iterator->changes = iterator->list->changes;
    return (PyObject *)iterator;
}

static PyObject *
next_page(PyObject *self)
{
    Iterator *iterator = (Iterator *)self;
    Linked *page = iterator->next;

    if (page == NULL)
        return NULL;
    if (iterator->changes != iterator->list->changes) {
        PyErr_SetString(PyExc_RuntimeError, "the list of pages has changed during iteration");
        return NULL;
    }
    iterator->next = page->after;
    Py_INCREF((PyObject *)page);
    return (PyObject *)page;
}

static int
traverse_iterator(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(((Iterator *)self)->list);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int
clear_iterator(PyObject *self)
{
    ((Iterator *)self)->next = NULL;
    Py_CLEAR(((Iterator *)self)->list);
    return 0;
}

static void
dealloc_iterator(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    clear_iterator(self);
    free_object(self);
}

/* --- the module --------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"append", append_method, METH_O, "append(page): add a page of no list as the youngest."},
    {"popleft", popleft_method, METH_NOARGS, "popleft(): remove and return the oldest page."},
    {"remove", remove_method, METH_O, "remove(page): take a page off the list."},
    {"remove_all", remove_all_method, METH_O, "remove_all(pages): take each page off the list."},
    {"move_to_end", move_to_end_method, METH_O, "move_to_end(page): make a page the youngest."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot list_slots[] = {
    {Py_tp_new, (void *)new_list},
    {Py_tp_dealloc, (void *)dealloc},
    {Py_tp_traverse, (void *)traverse},
    {Py_tp_clear, (void *)clear},
    {Py_tp_iter, (void *)iterate},
    {Py_tp_methods, methods},
    {Py_sq_length, (void *)length},
    {Py_sq_contains, (void *)contains},
    {Py_sq_item, (void *)item},
    {0, NULL},
};

static PyType_Spec list_spec = {
    .name = "softsgx._speedups.PageList",
    .basicsize = sizeof(PageList),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = list_slots,
};

static PyMethodDef va_methods[] = {
    {"append", append_method, METH_O, "append(page): add a page of no list as the last one."},
    {"remove", remove_method, METH_O, "remove(page): take a page off the list."},
    {"move_to_end", (PyCFunction)(void (*)(void))move_method, METH_VARARGS | METH_KEYWORDS,
     "move_to_end(page, last=True): make a page the last one, or the first."},
    {"clear", clear_method, METH_NOARGS, "clear(): take each page off the list."},
    {"__reversed__", reversed_method, METH_NOARGS, "Iterate from the last page."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot va_list_slots[] = {
    {Py_tp_new, (void *)new_list},
    {Py_tp_dealloc, (void *)dealloc},
    {Py_tp_traverse, (void *)traverse},
    {Py_tp_clear, (void *)clear},
    {Py_tp_iter, (void *)iterate},
    {Py_tp_methods, va_methods},
    {Py_sq_length, (void *)length},
    {Py_sq_contains, (void *)contains},
    {0, NULL},
};

static PyType_Spec va_list_spec = {
    .name = "softsgx._speedups.VaPageList",
    .basicsize = sizeof(PageList),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = va_list_slots,
};

static PyType_Slot iterator_slots[] = {
    {Py_tp_dealloc, (void *)dealloc_iterator},
    {Py_tp_traverse, (void *)traverse_iterator},
    {Py_tp_clear, (void *)clear_iterator},
    {Py_tp_iter, (void *)PyObject_SelfIter},
    {Py_tp_iternext, (void *)next_page},
    {0, NULL},
};

static PyType_Spec iterator_spec = {
    .name = "softsgx._speedups.PageListIterator",
    .basicsize = sizeof(Iterator),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = iterator_slots,
};

int
add_page_lists(PyObject *module)
{
    if (list_type == NULL)
        list_type = (PyTypeObject *)PyType_FromSpec(&list_spec);
    if (iterator_type == NULL)
        iterator_type = (PyTypeObject *)PyType_FromSpec(&iterator_spec);
    if (va_list_type == NULL)
        va_list_type = (PyTypeObject *)PyType_FromSpec(&va_list_spec);
    if (list_type == NULL || va_list_type == NULL || iterator_type == NULL
        || PyModule_AddObjectRef(module, "VaPageList", (PyObject *)va_list_type) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "PageList", (PyObject *)list_type);
}
