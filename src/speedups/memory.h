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

/* Whether a page's bytes are in the supervisor. */
static inline bool
is_hidden(const StoredPage *record)
{
    int64_t rights;

    return integer(record->rights, &rights) && rights == 0;
}

/* Whether no page table maps a page. */
static inline bool
is_unmapped(const StoredPage *record)
{
    int64_t maps;

    return integer(record->maps, &maps) && maps == 0;
}

/* As running() of a pager: whether a thread of its address space may be executing; 0, 1, or -1. */
int is_running(PyObject *function);

/* As parts() of page tables, of one that C code knows. */
PyObject *parts_of(PyObject *table, PyObject *memory, PyObject *start, PyObject *end);

/* PageRights: set the rights of a page; remove the pages of a range. */
int put_rights(PyObject *pages, PyObject *linaddr, PyObject *rights);
int drop_rights(PyObject *pages, uint64_t start, uint64_t end);

/* The page of a thread that waits: install() may leave its UFFDIO_COPY to the end of the fault, which
 * wakes the thread too.  Until then the file has a hole where page table and store say that the page
 * is shown: no Python code may run that could look. */
struct late_page {
    PyObject *memory, *page, *data, *rights; /* memory NULL: there is none; data NULL: zeros */
    PyObject *table; /* borrowed */
    uint64_t linaddr;
    int uffd;
};

/* Until expect_no_late_page(): install() may leave the page of that address to `late`. */
void expect_late_page(struct late_page *late, PyObject *table, int uffd, PyObject *linaddr);
void expect_no_late_page(void);

/* Leave the page to the end of the fault, if it is the one that is expected: whether it is. */
bool is_late(PyObject *table, int64_t uffd, uint64_t at, EnclaveMemory *memory, PyObject *linaddr,
             PyObject *data, PyObject *rights);

int show_late_page(struct late_page *late); /* without a wake-up; 0 too if there is none */
int wake_with_late_page(struct late_page *late); /* 1; 0: nothing is left to copy; -1: an error */

#endif
