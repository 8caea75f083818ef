/* The phases of a batch of reclaim: as softsgx.paging.optimised.PlainReclaimer.  Tasks do not
 * interleave here, so that scheduling points would do nothing. */

#include "driver.h"
#include "page_list.h"
#include "paging.h"

#include <stddef.h>

/* Call a method of a page's owner: 0, 1, or -1 with an error. */
static int
ask(PyObject *owner, int (*compiled)(PyObject *), PyObject *name)
{
    if (is_exactly(owner, given.CompiledPage))
        return compiled(owner);
    return is_so(PyObject_CallMethodObjArgs(owner, name, NULL));
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

/* Take the oldest page off a list and pin its owner: as Lru.isolate(); no other task runs, so that
 * the latch is free.  1; 0: its owner is being destroyed; or -1 with an error. */
static int
isolate_one(PageList *listed, PyObject *isolated)
{
    SgxEpcPage *page = list_popleft(listed);
    PyObject *owner;
    int pinned;

    if (page == NULL || page->owner == NULL || is_none(page->owner)) {
        PyErr_SetString(PyExc_AssertionError, "a page on a list has no owner");
        RELEASE(page);
        return -1;
    }
    Py_INCREF(owner = page->owner);
    pinned = ask(owner, page_get, names.get);
    if (pinned > 0 && PyList_Append(isolated, (PyObject *)page) < 0)
        pinned = -1;
    else if (pinned == 0) {  // its destructor frees the page; a tracked page would seem isolated
        set_flag(&page->tracked, false);
        set_field(&page->lru, Py_None);
    }
    Py_DECREF(owner);
    RELEASE(page);
    return pinned;
}

/* As Reclaimer._isolate(): a list, and how many more pages left the list; NULL with an error. */
static PyObject *
isolate(PyObject *lru, Py_ssize_t count, Py_ssize_t *dying)
{
    PyObject *isolated = PyList_New(0);
    PageList *listed = listed_pages(lru);
    Py_ssize_t left;
    int pinned = isolated == NULL || listed == NULL ? -1 : 0;

    *dying = 0;
    left = pinned < 0 ? 0 : listed->count;
    if (left > count)
        left = count;
    for (; pinned >= 0 && left > 0; left--) {
        pinned = isolate_one(listed, isolated);
        *dying += pinned == 0;
    }
    RELEASE(listed);
    if (pinned < 0 || left != 0)
        Py_CLEAR(isolated);
    return isolated;
}

PyObject *
reclaimer_isolate(PyObject *lru, Py_ssize_t count)
{
    Py_ssize_t dying;
    PyObject *isolated = isolate(lru, count, &dying), *result = NULL;

    if (isolated != NULL)
        result = Py_BuildValue("On", isolated, dying);
    Py_XDECREF(isolated);
    return result;
}

/* Age and prepare one page: 1: it is a victim, 0: it went back to its list.  The policy decides what
 * is old, or (NULL) the owner. */
static int
prepare_one(PyObject *reclaimer, PyObject *lru, PageList *listed, PyObject *decides,
            Counters *counters, SgxEpcPage *page, PyObject *owner, int force)
{
    int old, prepared;

    if (!is_false(page->poisoned))
        return skip(reclaimer, lru, page, owner, "poisoned");
    if (!is_false(page->kept))
        return add_to_field(&counters->kept, 1) < 0 ? -1
                                                    : skip(reclaimer, lru, page, owner, "kept");
    old = force             ? 1
        : decides != NULL ? is_so(CALL(decides, old, owner, NULL))
                          : ask(owner, page_age, names.age);
    if (old < 0)
        return -1;
    if (!old) {
        if (add_to_field(&counters->young, 1) < 0)
            return -1;
        if (!is_true(page->tracked) || page->lru != lru) {
            PyErr_SetString(PyExc_AssertionError, "a page was not isolated from here");
            return -1;
        }
        if (list_append(listed, page) < 0)
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
    PyObject *victims = PyList_New(0), *policy = GET(reclaimer, _policy), *owner;
    PageList *listed = listed_pages(lru);
    Counters *counters = counters_of(reclaimer);
    SgxEpcPage *page;
    int status = victims && listed && policy && counters ? 0 : -1;
    int usual = 1;

    if (status == 0 && !force)
        force = has_method_of(policy, given.Fifo, names.old);
    if (status == 0 && !force)
        usual = has_method_of(policy, given.Policy, names.old);
    if (force < 0 || usual < 0)
        status = -1;
    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(pages); index++) {
        if (!page_of(pages, index, &page, &owner)) {
            status = -1;
            break;
        }
        status = prepare_one(reclaimer, lru, listed, usual ? NULL : policy, counters, page, owner,
                             force);
        if (status > 0)
            status = PyList_Append(victims, (PyObject *)page);
        Py_DECREF(owner);
        RELEASE(page);
    }
    RELEASE(counters);
    Py_XDECREF(policy);
    RELEASE(listed);
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
free_one(PyObject *core, const PageList *listed, SgxEpcPage *page, PyObject *owner)
{
    if (is_listed(listed, page) || !is_true(page->tracked)) {
        PyErr_SetString(PyExc_AssertionError, "a page was not isolated");
        return -1;
    }
    set_flag(&page->tracked, false);
    set_field(&page->lru, Py_None);
    if (core_free(core, (PyObject *)page) < 0)
        return -1;
    return ask(owner, page_put, names.put) < 0 ? -1 : 0;
}

/* As PlainReclaimer._write(); the pages are freed by the core. */
PyObject *
reclaimer_write(PyObject *reclaimer, PyObject *lru, PyObject *pages)
{
    PageList *listed = listed_pages(lru);
    PyObject *core = GET(reclaimer, core), *owner;
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
    RELEASE(listed);
    return status < 0 ? NULL : PyLong_FromLong(freed);
}

/* As Reclaimer._choose(). */
static PyObject *
choose(PyObject *reclaimer, PyObject *lru, int force, Counters *counters, int64_t *scanned)
{
    PageList *listed = listed_pages(lru);
    PyObject *victims = PyList_New(0), *isolated, *prepared;
    Py_ssize_t dying, count, chosen = 0;
    int64_t most, limit;
    int status = -1;

    *scanned = 0;
    if (listed == NULL || victims == NULL
        || get_integer(reclaimer, names._batch_pages, &most) < 0
        || get_integer(reclaimer, names._scan_pages, &limit) < 0)
        goto done;
    if (limit < most)
        limit = most;
    if (limit > listed->count)
        limit = listed->count;
    status = 0;
    while (status == 0 && *scanned < limit && chosen < most) {
        count = limit - *scanned < most - chosen ? limit - *scanned : most - chosen;
        isolated = isolate(lru, count, &dying);
        count = isolated == NULL ? 0 : PyList_Size(isolated);
        *scanned += count + dying;
        prepared = isolated == NULL || (dying && add_to_field(&counters->dying, dying) < 0)
            ? NULL
            : reclaimer_prepare(reclaimer, lru, isolated, force);
        status = prepared == NULL ? -1 : PyList_SetSlice(victims, chosen, chosen, prepared);
        chosen = PyList_Size(victims);
        Py_XDECREF(prepared);
        Py_XDECREF(isolated);
        if (!count && !dying)
            break;
    }
done:
    if (status < 0)
        Py_CLEAR(victims);
    RELEASE(listed);
    return victims;
}

/* A Batch: as its __init__, which is Python code and does no more. */
PyObject *
new_batch(int64_t scanned, int64_t freed)
{
    PyObject *first = PyLong_FromLongLong(scanned), *second = PyLong_FromLongLong(freed);
    PyObject *batch = NULL;

    if (first != NULL && second != NULL
        && (batch = PyType_GenericAlloc((PyTypeObject *)given.Batch, 0)) != NULL
        && (PyObject_GenericSetAttr(batch, names.scanned, first) < 0
            || PyObject_GenericSetAttr(batch, names.freed, second) < 0))
        Py_CLEAR(batch);
    Py_XDECREF(second);
    Py_XDECREF(first);
    return batch;
}

/* As Reclaimer.batch(): 0, or -1 with an error. */
int
reclaimer_run(PyObject *reclaimer, PyObject *lru, int force, int64_t *scanned, int64_t *evicted)
{
    Counters *counters = counters_of(reclaimer);
    PyObject *victims = NULL, *blocked = NULL, *freed = NULL;
    int status = -1;

    if (counters != NULL && (victims = choose(reclaimer, lru, force, counters, scanned)) != NULL
        && (blocked = reclaimer_block(reclaimer, lru, victims)) != NULL
        && (freed = reclaimer_write(reclaimer, lru, blocked)) != NULL && integer(freed, evicted)
        && add_to_field(&counters->batches, 1) == 0
        && add_to_field(&counters->scanned, *scanned) == 0)
        status = add_to_field(&counters->reclaimed, *evicted);
    Py_XDECREF(freed);
    Py_XDECREF(blocked);
    Py_XDECREF(victims);
    RELEASE(counters);
    return status;
}

PyObject *
reclaimer_batch(PyObject *reclaimer, PyObject *lru, int force)
{
    int64_t scanned, freed;

    if (reclaimer_run(reclaimer, lru, force, &scanned, &freed) < 0)
        return NULL;
    return new_batch(scanned, freed);
}
