/* Sealing of pages: as PagingKey of softsgx.hw.secrets, from and to memory of C. */

#include "speedups.h"

#include <string.h>

#define MAC_HEADER_BYTES 128

/* --- memory as an argument ---------------------------------------------------------------------- */

/* An object whose bytes are any memory.  There are two: the cipher reads one and writes the other,
 * and keeps neither after its call. */
typedef struct {
    PyObject_HEAD
    char *bytes;
    Py_ssize_t length;
} Window;

static Window *input, *output;

static int
window_buffer(PyObject *self, Py_buffer *view, int flags)
{
    Window *window = (Window *)self;

    return PyBuffer_FillInfo(view, self, window->bytes, window->length, window == input, flags);
}

static PyObject *
show(Window *window, const char *bytes, Py_ssize_t length)
{
    window->bytes = (char *)bytes;
    window->length = length;
    return (PyObject *)window;
}

static int
make_windows(void)
{
    PyType_Slot slots[] = {{Py_bf_getbuffer, (void *)window_buffer}, {0, NULL}};
    PyType_Spec spec = {
        .name = "softsgx._speedups.Window",
        .basicsize = sizeof(Window),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);

    if (type == NULL)
        return -1;
    input = (Window *)PyType_GenericAlloc((PyTypeObject *)type, 0);
    output = (Window *)PyType_GenericAlloc((PyTypeObject *)type, 0);
    Py_DECREF(type);
    return input == NULL || output == NULL ? -1 : 0;
}

/* --- what the cipher needs ---------------------------------------------------------------------- */

bool
unsigned_of(PyObject *number, uint64_t *value)
{
    if (address(number, value))
        return true;
    *value = PyLong_AsUnsignedLongLong(number);
    return *value != (uint64_t)-1 || !PyErr_Occurred();
}

PyObject *
header_of(PyObject *eid, uint64_t linaddr, uint64_t flags)
{
    uint64_t header[MAC_HEADER_BYTES / sizeof(uint64_t)] = {0};

    if (!unsigned_of(eid, &header[0]))
        return NULL;
    header[1] = linaddr;
    header[2] = flags;
    return PyBytes_FromStringAndSize((const char *)header, sizeof header);
}

/* The initialisation vector of a version: four zero bytes, and its eight, the highest first. */
static PyObject *
nonce_of(PyObject *version)
{
    unsigned char bytes[12] = {0};
    uint64_t number;

    if (!unsigned_of(version, &number))
        return NULL;
    for (int index = 11; index >= 4; index--, number >>= 8)
        bytes[index] = (unsigned char)number;
    return PyBytes_FromStringAndSize((const char *)bytes, sizeof bytes);
}

PyObject *
paging_key(PyObject *hw)
{
    PyObject *secrets = GETF(Machine, hw, secrets), *key = NULL;

    if (secrets != NULL)
        key = GETF(Secrets, secrets, paging);
    Py_XDECREF(secrets);
    return key;
}

PyObject *
next_version(PyObject *key)
{
    PyObject *versions, *version;

    versions = GETF(PagingKey, key, _versions);
    if (versions == NULL)
        return NULL;
    version = PyIter_Next(versions);
    Py_DECREF(versions);
    if (version == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_AssertionError, "the versions of a paging key have ended");
    return version;
}

/* The key's cipher, and the vector of a version: 0, or -1 with an error. */
static int
cipher_of(PyObject *key, PyObject *version, PyObject **aead, PyObject **nonce)
{
    *nonce = NULL;
    *aead = GETF(PagingKey, key, _aead);
    if (*aead != NULL && is_none(*aead))
        replace(aead, CALL0(key, _cipher));
    if (*aead != NULL)
        *nonce = nonce_of(version);
    return *nonce == NULL ? -1 : 0;
}

/* Whether a cipher writes to memory that exists, which its library does from a version on. */
static bool
writes_into(PyObject *aead)
{
    static PyObject *type;
    static bool answer;

    if (type != (PyObject *)Py_TYPE(aead)) {
        Py_INCREF((PyObject *)Py_TYPE(aead));
        replace(&type, (PyObject *)Py_TYPE(aead));
        answer = PyObject_HasAttr(type, names.encrypt_into)
            && PyObject_HasAttr(type, names.decrypt_into);
    }
    return answer;
}

/* The cipher's library panics where it has no memory for its result, after it has written all else:
 * that is a MemoryError. */
static void
no_panic(void)
{
    PyObject *type = PyErr_Occurred(), *name;

    if (type == NULL || PyErr_ExceptionMatches(PyExc_Exception))
        return;
    name = PyType_GetName((PyTypeObject *)type);
    if (name != NULL && PyUnicode_CompareWithASCIIString(name, "PanicException") == 0)
        PyErr_NoMemory();
    Py_XDECREF(name);
}

/* --- sealing ------------------------------------------------------------------------------------ */

PyObject *
seal(PyObject *key, PyObject *version, PyObject *plain, PyObject *header, char *place)
{
    PyObject *aead, *nonce, *result = NULL;

    if (cipher_of(key, version, &aead, &nonce) < 0)
        goto done;
    if (place == NULL || !writes_into(aead))
        result = CALL(aead, encrypt, nonce, plain, header, NULL);
    else {
        result = CALL(aead, encrypt_into, nonce, plain, header, show(output, place, SEALED_BYTES),
                      NULL);
        show(output, NULL, 0);
        if (effect(result) < 0)
            no_panic(), result = NULL;
        else
            Py_INCREF(result = Py_None);
    }
done:
    Py_XDECREF(nonce);
    Py_XDECREF(aead);
    return result;
}

PyObject *
unseal(PyObject *key, PyObject *version, PyObject *object, const char *sealed, PyObject *header)
{
    PyObject *aead, *nonce, *plain = NULL;

    if (cipher_of(key, version, &aead, &nonce) < 0)
        goto done;
    if (sealed != NULL)
        object = show(input, sealed, SEALED_BYTES);
    if (sealed == NULL || !writes_into(aead))
        plain = CALL(aead, decrypt, nonce, object, header, NULL);
    else if ((plain = PyBytes_FromStringAndSize(NULL, PAGE_BYTES)) != NULL) {
        /* Nothing else has seen the new object. */
        if (effect(CALL(aead, decrypt_into, nonce, object, header,
                        show(output, PyBytes_AsString(plain), PAGE_BYTES), NULL)) < 0) {
            no_panic();
            Py_CLEAR(plain);
        }
        show(output, NULL, 0);
    }
    show(input, NULL, 0);
done:
    Py_XDECREF(nonce);
    Py_XDECREF(aead);
    return plain;
}

int
add_cipher(PyObject *Py_UNUSED(module))
{
    return output == NULL ? make_windows() : 0;
}
