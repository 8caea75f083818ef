/* The phases of a batch of reclaim: as softsgx.paging.optimised.PlainReclaimer. */

#include "speedups.h"

#include <stddef.h>

/* Call a method of a page's owner: 0, 1, or -1 with an error. */
static int
ask(PyObject *owner, int (*compiled)(PyObject *), PyObject *name)
{
    PyObject *answer;
    int truth;

    if (is_exactly(owner, given.CompiledPage))
        return compiled(owner);
    answer = PyObject_CallMethodObjArgs(owner, name, NULL);
    truth = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return truth;
}

/* One page of a batch, its record and owner referenced; false: an error is set. */
static bool
page_of(PyObject *pages, Py_ssize_t index, SgxEpcPage **page, PyObject **owner)
{
    *page = AS(SgxEpcPage, PyList_GetItem(pages, index));
    if (*page == NULL || (*page)->owner == NULL || is_none((*page)->owner)) {
        PyErr_SetString(PyExc_AssertionError, "a page in a batch has no owner");
        return false;
    }
    HOLD(*page);
    Py_INCREF(*owner = (*page)->owner);
    return true;
}

static int
skip(PyObject *reclaimer, PyObject *lru, SgxEpcPage *page, PyObject *owner, const char *stage)
{
    PyObject *word = PyUnicode_FromString(stage);
    int status;

    if (word == NULL)
        return -1;
    status = effect(CALL(reclaimer, _skip, lru, (PyObject *)page, owner, word, NULL));
    Py_DECREF(word);
    return status;
}

static Counters *
counters_of(PyObject *reclaimer)
{
    PyObject *object = GET(reclaimer, _counters);
    Counters *counters = AS(Counters, object);

    if (counters == NULL && object != NULL)
        PyErr_SetString(PyExc_TypeError, "the core's counters are no Counters");
    if (counters == NULL)
        Py_XDECREF(object);
    return counters;
}

/* Whether a page may leave: 0, 1, or -1 with an error. */
static int
is_old(PyObject *policy, PyObject *owner)
{
    PyObject *mine = PyObject_GetAttr((PyObject *)Py_TYPE(policy), names.old);
    PyObject *usual = PyObject_GetAttr(given.Policy, names.old), *answer;
    int truth = -1;

    if (mine != NULL && usual != NULL) {
        if (mine == usual)
            truth = ask(owner, page_age, names.age);
        else if ((answer = CALL(policy, old, owner, NULL)) != NULL) {
            truth = PyObject_IsTrue(answer);
            Py_DECREF(answer);
        }
    }
    Py_XDECREF(usual);
    Py_XDECREF(mine);
    return truth;
}

/* Age and prepare one page: 1: it is a victim, 0: it went back to its list. */
static int
prepare_one(PyObject *reclaimer, PyObject *lru, PyObject *listed, PyObject *policy,
            Counters *counters, SgxEpcPage *page, PyObject *owner, int force)
{
    int old, prepared;

    if (!is_false(page->poisoned))
        return skip(reclaimer, lru, page, owner, "poisoned");
    if (!is_false(page->kept))
        return add_to_field(&counters->kept, 1) < 0 ? -1
                                                    : skip(reclaimer, lru, page, owner, "kept");
    old = force ? 1 : is_old(policy, owner);
    if (old < 0)
        return -1;
    if (!old) {
        if (add_to_field(&counters->young, 1) < 0)
            return -1;
        if (!is_true(page->tracked) || page->lru != lru) {
            PyErr_SetString(PyExc_AssertionError, "a page was not isolated from here");
            return -1;
        }
        if (PyObject_SetItem(listed, (PyObject *)page, Py_None) < 0)
            return -1;
        return ask(owner, page_put, names.put) < 0 ? -1 : 0;
    }
    prepared = ask(owner, page_prepare, names.prepare);
    if (prepared)
        return prepared;
    return add_to_field(&counters->not_prepared, 1) < 0
        ? -1
        : skip(reclaimer, lru, page, owner, "prepare");
}

/* As PlainReclaimer._prepare(). */
PyObject *
reclaimer_prepare(PyObject *reclaimer, PyObject *lru, PyObject *pages, int force)
{
    PyObject *victims = PyList_New(0), *listed = GET(lru, pages), *owner;
    PyObject *policy = GET(reclaimer, _policy);
    Counters *counters = counters_of(reclaimer);
    SgxEpcPage *page;
    int status = victims && listed && policy && counters ? 0 : -1;

    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(pages); index++) {
        if (!page_of(pages, index, &page, &owner)) {
            status = -1;
            break;
        }
        status = prepare_one(reclaimer, lru, listed, policy, counters, page, owner, force);
        if (status > 0)
            status = PyList_Append(victims, (PyObject *)page);
        Py_DECREF(owner);
        RELEASE(page);
    }
    RELEASE(counters);
    Py_XDECREF(policy);
    Py_XDECREF(listed);
    if (status < 0)
        Py_CLEAR(victims);
    return victims;
}

/* As Reclaimer._block(). */
PyObject *
reclaimer_block(PyObject *reclaimer, PyObject *lru, PyObject *pages)
{
    PyObject *blocked = PyList_New(0), *owner;
    Counters *counters = counters_of(reclaimer);
    SgxEpcPage *page;
    int status = blocked && counters ? 0 : -1;

    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(pages); index++) {
        if (!page_of(pages, index, &page, &owner)) {
            status = -1;
            break;
        }
        status = ask(owner, page_block, names.block);
        if (status > 0)
            status = PyList_Append(blocked, (PyObject *)page);
        else if (status == 0)
            status = add_to_field(&counters->not_blocked, 1) < 0
                ? -1
                : skip(reclaimer, lru, page, owner, "block");
        Py_DECREF(owner);
        RELEASE(page);
    }
    RELEASE(counters);
    if (status < 0)
        Py_CLEAR(blocked);
    return blocked;
}

/* A page was evicted: free it. */
static int
free_one(PyObject *core, PyObject *listed, SgxEpcPage *page, PyObject *owner)
{
    int here = PySequence_Contains(listed, (PyObject *)page);

    if (here < 0)
        return -1;
    if (here || !is_true(page->tracked)) {
        PyErr_SetString(PyExc_AssertionError, "a page was not isolated");
        return -1;
    }
    set_field(&page->tracked, Py_False);
    set_field(&page->lru, Py_None);
    if (core_free(core, (PyObject *)page) < 0)
        return -1;
    return ask(owner, page_put, names.put) < 0 ? -1 : 0;
}

/* As PlainReclaimer._write(); the pages are freed by the core. */
PyObject *
reclaimer_write(PyObject *reclaimer, PyObject *lru, PyObject *pages)
{
    PyObject *listed = GET(lru, pages), *core = GET(reclaimer, core), *owner;
    Counters *counters = counters_of(reclaimer);
    SgxEpcPage *page;
    long freed = 0;
    int status = listed && core && counters ? 0 : -1, written;

    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(pages); index++) {
        if (!page_of(pages, index, &page, &owner)) {
            status = -1;
            break;
        }
        written = ask(owner, page_write, names.write);
        if (written > 0) {
            status = free_one(core, listed, page, owner);
            freed++;
        }
        else if (written == 0)
            status = add_to_field(&counters->not_written, 1) < 0
                ? -1
                : skip(reclaimer, lru, page, owner, "write");
        else
            status = -1;
        Py_DECREF(owner);
        RELEASE(page);
    }
    RELEASE(counters);
    Py_XDECREF(core);
    Py_XDECREF(listed);
    return status < 0 ? NULL : PyLong_FromLong(freed);
}
