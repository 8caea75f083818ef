/* Sealing of pages: as PagingKey of softsgx.hw.secrets, from and to memory of C. */

#include "leaves.h"

#include <string.h>

/* --- memory as an argument ---------------------------------------------------------------------- */

/* An object whose bytes are any memory.  The cipher reads all of these but `output`, which it writes,
 * and keeps none after its call. */
typedef struct {
    PyObject_HEAD
    char *bytes;
    Py_ssize_t length;
} Window;

static Window *input, *nonce, *associated, *output;

static int
window_buffer(PyObject *self, Py_buffer *view, int flags)
{
    Window *window = (Window *)self;

    return PyBuffer_FillInfo(view, self, window->bytes, window->length, window != output, flags);
}

static PyObject *
show(Window *window, const void *bytes, Py_ssize_t length)
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
    Window **const windows[] = {&input, &nonce, &associated, &output};
    int status = type == NULL ? -1 : 0;

    for (size_t index = 0; status == 0 && index < sizeof windows / sizeof *windows; index++) {
        *windows[index] = (Window *)PyType_GenericAlloc((PyTypeObject *)type, 0);
        status = *windows[index] == NULL ? -1 : 0;
    }
    Py_XDECREF(type);
    return status;
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

bool
fill_header(struct mac_header *header, PyObject *eid, uint64_t linaddr, uint64_t flags)
{
    *header = (struct mac_header){.linaddr = linaddr, .flags = flags};
    return unsigned_of(eid, &header->eid);
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

/* A cipher in C that writes to memory, as its library has them from a version on; the latest one. */
struct cipher {
    PyObject *aead, *encrypt_into, *decrypt_into; /* its methods are NULL, if it does not */
};
static struct cipher latest;

/* A method that C code has; NULL, perhaps with an error. */
static PyObject *
method_in_c(PyObject *aead, PyObject *name)
{
    PyObject *method = PyObject_GetAttr(aead, name);

    if (method == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    if (method != NULL && !PyCFunction_CheckExact(method))
        Py_CLEAR(method);
    return method;
}

/* Find the methods of a cipher, whose reference is taken over: 0, or -1 with an error. */
static int
use_cipher(PyObject *aead)
{
    PyObject *encrypt = NULL, *decrypt = NULL;

    encrypt = method_in_c(aead, names.encrypt_into);
    if (encrypt != NULL)
        decrypt = method_in_c(aead, names.decrypt_into);
    if (decrypt == NULL)
        Py_CLEAR(encrypt);
    if (PyErr_Occurred()) {
        Py_DECREF(aead);
        return -1;
    }
    replace(&latest.encrypt_into, encrypt);
    replace(&latest.decrypt_into, decrypt);
    replace(&latest.aead, aead);
    return 0;
}

/* The key's cipher, with new references: 0, or -1 with an error. */
static int
cipher_of(PyObject *key, struct cipher *cipher)
{
    PyObject *aead = GETF(PagingKey, key, _aead);

    if (aead != NULL && is_none(aead))
        replace(&aead, CALL0(key, _cipher));
    if (aead == NULL)
        return -1;
    if (aead != latest.aead) {
        if (use_cipher(aead) < 0)
            return -1;
    }
    else
        Py_DECREF(aead);
    *cipher = latest; /* three that belong together */
    Py_INCREF(cipher->aead);
    Py_XINCREF(cipher->encrypt_into);
    Py_XINCREF(cipher->decrypt_into);
    return 0;
}

static void
release(struct cipher *cipher)
{
    Py_DECREF(cipher->aead);
    Py_XDECREF(cipher->encrypt_into);
    Py_XDECREF(cipher->decrypt_into);
}

/* Call a method of four arguments. */
static int
call(PyObject *method, PyObject *const args[4])
{
    _PyCFunctionFastWithKeywords function;

    if (PyCFunction_GetFlags(method) != (METH_FASTCALL | METH_KEYWORDS))
        return effect(PyObject_CallFunctionObjArgs(method, args[0], args[1], args[2], args[3], NULL));
    function = (_PyCFunctionFastWithKeywords)(void (*)(void))PyCFunction_GetFunction(method);
    return effect(function(PyCFunction_GetSelf(method), args, 4, NULL));
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

#define NONCE_BYTES 12

/* The initialisation vector of a version: four zero bytes, and its eight, the highest first. */
static void
fill_nonce(unsigned char bytes[NONCE_BYTES], uint64_t version)
{
    uint64_t reversed = __builtin_bswap64(version);

    memset(bytes, 0, NONCE_BYTES);
    memcpy(bytes + NONCE_BYTES - sizeof reversed, &reversed, sizeof reversed);
}

/* Encrypt or decrypt to memory: 0, or -1 with an error. */
static int
into(PyObject *method, uint64_t version, PyObject *from, const struct mac_header *header, char *to,
     Py_ssize_t length)
{
    unsigned char bytes[NONCE_BYTES];
    int status;

    fill_nonce(bytes, version);
    status = call(method, (PyObject *[]){show(nonce, bytes, sizeof bytes), from,
                                         show(associated, header, sizeof *header),
                                         show(output, to, length)});
    show(nonce, NULL, 0);
    show(associated, NULL, 0);
    show(output, NULL, 0);
    if (status < 0)
        no_panic();
    return status;
}

/* The same with objects, by a cipher that makes one of the result. */
static PyObject *
made(PyObject *aead, PyObject *name, uint64_t version, PyObject *from,
     const struct mac_header *header)
{
    unsigned char bytes[NONCE_BYTES];
    PyObject *vector, *data, *result = NULL;

    fill_nonce(bytes, version);
    vector = PyBytes_FromStringAndSize((char *)bytes, sizeof bytes);
    data = PyBytes_FromStringAndSize((const char *)header, sizeof *header);
    if (vector != NULL && data != NULL)
        result = PyObject_CallMethodObjArgs(aead, name, vector, from, data, NULL);
    Py_XDECREF(data);
    Py_XDECREF(vector);
    return result;
}

PyObject *
seal(PyObject *key, uint64_t version, PyObject *plain, const struct mac_header *header, char *place)
{
    struct cipher cipher;
    PyObject *result = NULL;

    if (cipher_of(key, &cipher) < 0)
        return NULL;
    if (place == NULL || cipher.encrypt_into == NULL)
        result = made(cipher.aead, names.encrypt, version, plain, header);
    else if (into(cipher.encrypt_into, version, plain, header, place, SEALED_BYTES) == 0)
        Py_INCREF(result = Py_None);
    release(&cipher);
    return result;
}

PyObject *
unseal(PyObject *key, uint64_t version, PyObject *object, const char *sealed,
       const struct mac_header *header)
{
    struct cipher cipher;
    PyObject *plain = NULL, *copy = NULL;

    if (cipher_of(key, &cipher) < 0)
        return NULL;
    /* Nothing else has seen the new object. */
    if (sealed != NULL && cipher.decrypt_into != NULL) {
        plain = PyBytes_FromStringAndSize(NULL, PAGE_BYTES);
        if (plain != NULL
            && into(cipher.decrypt_into, version, show(input, sealed, SEALED_BYTES), header,
                    PyBytes_AsString(plain), PAGE_BYTES) < 0)
            Py_CLEAR(plain);
        show(input, NULL, 0);
    }
    /* Code in Python can keep what it gets. */
    else if (sealed == NULL
             || (object = copy = PyBytes_FromStringAndSize(sealed, SEALED_BYTES)) != NULL)
        plain = made(cipher.aead, names.decrypt, version, object, header);
    Py_XDECREF(copy);
    release(&cipher);
    return plain;
}

int
add_cipher(PyObject *Py_UNUSED(module))
{
    return output == NULL ? make_windows() : 0;
}
