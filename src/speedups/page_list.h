/* Lists of EPC pages: as softsgx.paging.page_list; of VA pages: as VaPageList of softsgx.paging. */

#ifndef SOFTSGX_PAGE_LIST_H
#define SOFTSGX_PAGE_LIST_H

#include "speedups.h"

/* Of the type PageList or VaPageList.  A list has a reference to each of its pages. */
typedef struct page_list {
    PyObject_HEAD
    Linked *first, *last;
    Py_ssize_t count;
    uint64_t changes;
} PageList;

/* The first VA page of a VaPageList, borrowed; NULL, and no error: it has none, or is none.  As
 * move_to_end() of it, of a page that is on it. */
VaPage *first_va_page(PyObject *object);
int move_va_page(PyObject *object, VaPage *page, bool last);

/* An object, whose reference is taken over, as a list; NULL with an error: it is none, or NULL. */
PageList *page_list(PyObject *object);

/* The pages of an Lru, a new reference. */
PageList *listed_pages(PyObject *lru);
int list_append(PageList *list, SgxEpcPage *page);

/* The oldest page, of which the caller takes over the list's reference; NULL, and no error: none. */
SgxEpcPage *list_popleft(PageList *list);

static inline bool
is_listed(const PageList *list, const SgxEpcPage *page)
{
    return page->list == list;
}

#endif
