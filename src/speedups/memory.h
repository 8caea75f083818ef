/* What the parts of the native engine's enclave memory in C share: memory.c, hiding.c, late_page.c,
 * page_rights.c. */

#ifndef MEMORY_H
#define MEMORY_H

#include "speedups.h"

#define READ_WRITE 3
#define WRITE 2
#define EXECUTE 4

/* Of a page table that C code knows: its pager, if page faults come by userfaultfd and nothing is
 * recorded; otherwise NULL. */
UffdPager *pager_of(PyObject *table);

/* The same, if no page has to get or lose PROT_EXEC; NULL with an error, too. */
UffdPager *usual_pager(PyObject *table);

/* Whether pages of a page table are in a PageMap and PageSets. */
bool has_page_maps(const EnclavePageTable *table);

/* Whether a page's bytes are in the supervisor. */
static inline bool
is_hidden(const StoredPage *record)
{
    return record->rights == 0;
}

/* Whether no page table maps a page. */
static inline bool
is_unmapped(const StoredPage *record)
{
    return record->maps == 0;
}

/* As running() of a pager: whether a thread of its address space may be executing; 0, 1, or -1. */
int is_running(PyObject *function);

/* Runs of pages, for PyMem_Free(): 0, or -1 with an error. */
struct run {
    uint64_t start, end;
};
struct runs {
    struct run *each;
    size_t count, room;
};
int add_run(struct runs *runs, struct run run);

/* Add the parts of a range: as parts() of page tables, of one that C code knows. */
int add_parts(PyObject *table, PyObject *memory, struct run range, struct runs *parts);

/* PageMap, RightsMap and PageSet, which the caller has: the object of a page, borrowed, or NULL; the
 * same taken out; its number, or 0; whether a page was there.  put and add return 0, or -1 with an
 * error. */
extern PyTypeObject *page_map_type, *rights_map_type, *page_set_type;
PyObject *map_get(PyObject *map, uint64_t linaddr);
int map_put(PyObject *map, uint64_t linaddr, PyObject *object);
PyObject *map_take(PyObject *map, uint64_t linaddr);
void map_clear(PyObject *map);
uint8_t rights_get(PyObject *numbers, uint64_t linaddr);
int rights_put(PyObject *numbers, uint64_t linaddr, uint8_t number);
bool set_has(PyObject *set, uint64_t linaddr);
int set_add(PyObject *set, uint64_t linaddr);
bool set_discard(PyObject *set, uint64_t linaddr);
void set_clear(PyObject *set);

/* Of RightsMap or a PageSet: remove the pages of which a range has a part. */
void drop_range(PyObject *pages, uint64_t start, uint64_t end);

/* Of each: the number of pages, and all of them, ascending, for PyMem_Free(); NULL: an error. */
Py_ssize_t pages_in(PyObject *pages);
uint64_t *pages_of(PyObject *pages);

/* Runs of adjacent pages among ascending ones: how many. */
size_t find_runs(const uint64_t *pages, size_t count, struct run *runs);

/* PageRights: set the rights of a page; remove the pages of a range. */
int put_rights(PyObject *pages, uint64_t linaddr, int64_t rights);
int drop_rights(PyObject *pages, uint64_t start, uint64_t end);

/* The page of a thread that waits: install() may leave its UFFDIO_COPY to the end of the fault, which
 * wakes the thread too.  Until then the file has a hole where page table and store say that the page
 * is shown: no Python code may run that could look. */
struct late_page {
    PyObject *memory, *data; /* memory NULL: there is none; data NULL: zeros */
    PyObject *table; /* borrowed */
    uint64_t linaddr;
    int64_t rights;
    int uffd;
};

/* Until take_late_page(): install() of the same task may leave the page of that address to it.  False: it
 * may not, and there is nothing to take. */
bool expect_late_page(PyObject *table, int uffd, uint64_t linaddr);
void take_late_page(struct late_page *late);

/* Leave the page to the end of the fault, if it is the one that is expected: whether it is. */
bool is_late(PyObject *table, int64_t uffd, uint64_t linaddr, EnclaveMemory *memory, PyObject *data,
             int64_t rights);

/* As show() of a memory file: that of the only user of the file. */
int show_by_method(PyObject *memory, uint64_t linaddr, PyObject *data, int64_t rights,
                   PyObject *user);

int show_late_page(struct late_page *late); /* without a wake-up; 0 too if there is none */
int wake_with_late_page(struct late_page *late); /* 1; 0: nothing is left to copy; -1: an error */

#endif
