/* Finding instructions in code: CPUID, and whether decoding from earlier places arrives at one.
 *
 * The readable forms are softsgx/engines/native/x86/rewrite.py and, for lengths, insn.py. */

#include "speedups.h"

#include <stdint.h>
#include <string.h>

#define LONGEST 15
#define BACK 96
#define AHEAD 6
#define RECENT 16
#define TOO_FEW 12
#define IN_STEP 0.7
#define CPUID_BYTES 2

/* Code of at most LONGEST bytes, of which the first is read first. */
struct code {
    const uint8_t *bytes;
    Py_ssize_t size;
};

/* Return a byte; -1: there is none. */
static int
byte_at(const struct code *code, Py_ssize_t at)
{
    return at < code->size ? code->bytes[at] : -1;
}

static int
is_prefix(int byte)
{
    switch (byte) {
    case 0x66: case 0x67: case 0xF0: case 0xF2: case 0xF3: case 0x2E: case 0x36: case 0x3E:
    case 0x26: case 0x64: case 0x65:
        return 1;
    default:
        return byte >= 0 && (byte & 0xF0) == 0x40;
    }
}

/* Return the bytes of ModRM, SIB and displacement, and set the reg field; -1: the code ends. */
static int
modrm_bytes(const struct code *code, Py_ssize_t at, int *reg)
{
    int byte = byte_at(code, at), mod = byte >> 6, base = byte & 7, size = 1;

    if (byte < 0)
        return -1;
    *reg = byte >> 3 & 7;
    if (mod == 3)
        return 1;
    if (base == 4) {
        int sib = byte_at(code, at + 1);

        if (sib < 0)
            return -1;
        base = sib & 7;
        size = 2;
    }
    if (mod == 1)
        return size + 1;
    return mod == 2 || base == 5 ? size + 4 : size;
}

static int
has_modrm(int opcode)
{
    if (opcode < 0x40)
        return (opcode & 7) < 4;
    switch (opcode) {
    case 0x63: case 0x69: case 0x6B: case 0xC0: case 0xC1: case 0xC6: case 0xC7:
    case 0xF6: case 0xF7: case 0xFE: case 0xFF:
        return 1;
    default:
        return (opcode >= 0x80 && opcode < 0x90) || (opcode >= 0xD0 && opcode < 0xD4)
            || (opcode >= 0xD8 && opcode < 0xE0);
    }
}

/* Return the bytes of the immediate of an instruction of the first map. */
static int
immediate_bytes(int opcode, int reg, int wide, int short_operand)
{
    int word = short_operand ? 2 : 4;

    if (opcode < 0x40)
        return (opcode & 7) == 5 ? word : (opcode & 7) == 4;
    if ((opcode & 0xF8) == 0xB8)
        return wide ? 8 : word;
    switch (opcode) {
    case 0x68: case 0x69: case 0x81: case 0xA9: case 0xC7:
        return word;
    case 0xE8: case 0xE9:
        return 4;
    case 0x6A: case 0x6B: case 0x80: case 0x83: case 0xA8: case 0xC0: case 0xC1: case 0xC6:
    case 0xCD: case 0xEB:
        return 1;
    case 0xC2: case 0xCA:
        return 2;
    case 0xC8:
        return 3;
    case 0xA0: case 0xA1: case 0xA2: case 0xA3:
        return 8;
    case 0xF6:
        return reg < 2;
    case 0xF7:
        return reg < 2 ? word : 0;
    default:
        return (opcode >= 0x70 && opcode < 0x80) || (opcode >= 0xB0 && opcode < 0xB8)
            || (opcode >= 0xE0 && opcode < 0xE8);
    }
}

/* Of the second map, and of VEX and EVEX instructions of it: an immediate of a byte. */
static int
has_byte(int opcode)
{
    switch (opcode) {
    case 0x70: case 0x71: case 0x72: case 0x73: case 0xA4: case 0xAC: case 0xBA: case 0xC2:
    case 0xC4: case 0xC5: case 0xC6:
        return 1;
    default:
        return 0;
    }
}

static int
is_plain(int opcode) /* of the second map, without ModRM */
{
    switch (opcode) {
    case 0x05: case 0x06: case 0x07: case 0x08: case 0x09: case 0x0B: case 0x0E: case 0x77:
    case 0xA0: case 0xA1: case 0xA2: case 0xA8: case 0xA9: case 0xAA:
        return 1;
    default:
        return (opcode >= 0x30 && opcode < 0x38) || (opcode >= 0xC8 && opcode < 0xD0);
    }
}

/* ``at`` is behind the opcode.  Return the length, -1: the code ends. */
static Py_ssize_t
with_modrm(const struct code *code, Py_ssize_t at, int more)
{
    int reg, size = modrm_bytes(code, at, &reg);

    return size < 0 ? -1 : at + size + more;
}

static Py_ssize_t
vector_length(const struct code *code, Py_ssize_t at, int first)
{
    int table, evex = first == 0x62, opcode;

    if (byte_at(code, at + 1) < 0)
        return -1;
    table = first == 0xC5 ? 1 : code->bytes[at + 1] & (first == 0xC4 ? 0x1F : 7);
    at += first == 0xC5 ? 2 : first == 0xC4 ? 3 : 4;
    opcode = byte_at(code, at);
    if (opcode < 0)
        return -1;
    at++;
    if (table == 1 && opcode == 0x77 && !evex)
        return at;
    return with_modrm(code, at, table == 1 ? has_byte(opcode) : table == 3);
}

static Py_ssize_t
second_map_length(const struct code *code, Py_ssize_t at)
{
    int opcode = byte_at(code, at++);

    if (opcode < 0)
        return -1;
    if (opcode == 0x38 || opcode == 0x3A)
        return byte_at(code, at) < 0 ? -1 : with_modrm(code, at + 1, opcode == 0x3A);
    if (is_plain(opcode))
        return at;
    return (opcode & 0xF0) == 0x80 ? at + 4 : with_modrm(code, at, has_byte(opcode));
}

/* Return the length of the instruction that ``code`` begins with; 0: unknown, or it is cut off. */
static Py_ssize_t
decoded_length(const uint8_t *bytes, Py_ssize_t size)
{
    struct code code = {bytes, size < LONGEST ? size : LONGEST};
    int wide = 0, short_operand = 0, first, reg = 0;
    Py_ssize_t at = 0, length;

    for (; is_prefix(first = byte_at(&code, at)); at++) {
        wide = (first & 0xF8) == 0x48; /* a REX counts only right before the opcode */
        short_operand |= first == 0x66;
    }
    if (first < 0)
        return 0;
    if (first == 0xC4 || first == 0xC5 || first == 0x62)
        length = vector_length(&code, at, first);
    else if (first == 0x0F)
        length = second_map_length(&code, at + 1);
    else {
        at++;
        if (has_modrm(first)) {
            int modrm = modrm_bytes(&code, at, &reg);

            if (modrm < 0)
                return 0;
            at += modrm;
        }
        length = at + immediate_bytes(first, reg, wide, short_operand);
    }
    return length < 0 || length > code.size ? 0 : length;
}

/* Whether the instruction at the start writes EAX, as loads of a leaf do. */
static int
loads_eax(const uint8_t *bytes, Py_ssize_t size)
{
    Py_ssize_t at = (bytes[0] & 0xF0) == 0x40;
    int opcode, modrm;

    if (at >= size)
        return 0;
    opcode = bytes[at];
    if (opcode == 0xB8 || opcode == 0x58) /* mov eax, imm; pop rax */
        return 1;
    if (size < at + 2)
        return 0;
    modrm = bytes[at + 1];
    switch (opcode) {
    case 0x89: case 0x31: case 0x29: case 0x09: case 0x01: /* op r/m, reg */
    case 0x81: case 0x83: case 0xFF:
        return modrm >> 6 == 3 && (modrm & 7) == 0;
    case 0x8B: case 0x33: case 0x2B: case 0x8D: case 0x03: /* op reg, r/m */
        return (modrm >> 3 & 7) == 0;
    default:
        return 0;
    }
}

/* From how many places before ``at`` decoding arrives there; with EAX loaded; of how many. */
static void
arrivals(const struct code *code, Py_ssize_t at, int *arrived, int *loaded, int *starts)
{
    int steps[BACK + 1], loads[BACK + 1]; /* by the distance from ``at``; -1: it does not arrive */
    int most = (int)(at < BACK ? at : BACK);

    steps[0] = loads[0] = *arrived = *loaded = 0;
    *starts = most;
    for (int distance = 1; distance <= most; distance++) {
        const uint8_t *start = code->bytes + at - distance;
        Py_ssize_t size = code->size - at + distance;
        Py_ssize_t length = decoded_length(start, size);

        steps[distance] = -1;
        if (!length || length > distance || steps[distance - length] < 0)
            continue;
        steps[distance] = steps[distance - length] + 1;
        loads[distance] = loads[distance - length]
            || (steps[distance] <= RECENT && loads_eax(start, size < LONGEST ? size : LONGEST));
        ++*arrived;
        *loaded += loads[distance];
    }
}

static int
goes_on(const struct code *code, Py_ssize_t at)
{
    for (int step = 0; step < AHEAD && at < code->size; step++) {
        Py_ssize_t length = decoded_length(code->bytes + at, code->size - at);

        if (!length)
            return 0;
        at += length;
    }
    return 1;
}

static int
is_cpuid(const struct code *code, Py_ssize_t at)
{
    int arrived, loaded, starts;

    arrivals(code, at, &arrived, &loaded, &starts);
    if (starts && arrived < IN_STEP * starts)
        return 0;
    return loaded * 2 > arrived && goes_on(code, at + CPUID_BYTES);
}

static int
read_code(PyObject *object, struct code *code)
{
    char *bytes;

    if (PyBytes_AsStringAndSize(object, &bytes, &code->size) < 0)
        return -1;
    code->bytes = (const uint8_t *)bytes;
    return 0;
}

/* Read code and a place in it; -1: a Python error. */
static int
read_place(const char *name, PyObject *const *args, Py_ssize_t count, struct code *code,
           Py_ssize_t *at)
{
    if (count != 2) {
        PyErr_Format(PyExc_TypeError, "%s() takes code and a place in it", name);
        return -1;
    }
    if (read_code(args[0], code) < 0)
        return -1;
    *at = PyLong_AsSsize_t(args[1]);
    if (*at == -1 && PyErr_Occurred())
        return -1;
    if (*at < 0 || *at > code->size) {
        PyErr_Format(PyExc_ValueError, "%s(): no place in the code", name);
        return -1;
    }
    return 0;
}

static PyObject *
in_step(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    int arrived, loaded, starts;
    struct code code;
    Py_ssize_t at;

    if (read_place("in_step", args, count, &code, &at) < 0)
        return NULL;
    arrivals(&code, at, &arrived, &loaded, &starts);
    return PyBool_FromLong((starts < TOO_FEW || arrived >= IN_STEP * starts) && goes_on(&code, at));
}

static PyObject *
executes_cpuid(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    struct code code;
    Py_ssize_t at;

    if (read_place("executes_cpuid", args, count, &code, &at) < 0)
        return NULL;
    return PyBool_FromLong(is_cpuid(&code, at));
}

static PyObject *
cpuid_pairs(PyObject *Py_UNUSED(module), PyObject *object)
{
    struct code code;
    const uint8_t *at, *end;
    PyObject *places;

    if (read_code(object, &code) < 0 || (places = PyList_New(0)) == NULL)
        return NULL;
    end = code.bytes + code.size;
    /* The second byte of CPUID is the rarer. */
    for (at = code.bytes + 1; at < end && (at = memchr(at, 0xA2, end - at)) != NULL; at++) {
        PyObject *place;
        int failed;

        if (at[-1] != 0x0F)
            continue;
        place = PyLong_FromSsize_t(at - 1 - code.bytes);
        failed = place == NULL || PyList_Append(places, place) < 0;
        Py_XDECREF(place);
        if (failed) {
            Py_DECREF(places);
            return NULL;
        }
    }
    return places;
}

static PyMethodDef functions[] = {
    {"in_step", (PyCFunction)(void (*)(void))in_step, METH_FASTCALL,
     "in_step(code, at): whether an instruction starts there."},
    {"executes_cpuid", (PyCFunction)(void (*)(void))executes_cpuid, METH_FASTCALL,
     "executes_cpuid(code, at): whether the bytes of CPUID there are one."},
    {"cpuid_pairs", cpuid_pairs, METH_O, "cpuid_pairs(code): where the bytes of CPUID are."},
    {NULL, NULL, 0, NULL},
};

int
add_instructions(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
