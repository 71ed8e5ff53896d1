/* The Python module `data._native`: checked arguments in, decoded pixels or messages out.
 *
 * Every function releases the interpreter's lock while it works, so that threads decode side by
 * side, each with a decoder of its own. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "native.h"

/* The columns of `decode`'s jobs, int32, in this order. */
enum {
    IMAGE_WIDTH, IMAGE_HEIGHT, LEFT, TOP, RIGHT, BOTTOM, WIDTH, HEIGHT,
    WINDOW_LEFT, WINDOW_TOP, WINDOW_RIGHT, WINDOW_BOTTOM, KERNEL, FLIP, REDUCE,
    COLUMNS
};
enum { MAX_SIDE = 65535 };

typedef struct {
    Py_buffer image, index;
    Status status;
    char message[MESSAGE_LENGTH];
} Work;

static int inside(Box box, int width, int height) {
    return 0 <= box.left && box.left < box.right && box.right <= width && 0 <= box.top &&
           box.top < box.bottom && box.bottom <= height;
}

static int valid(const Job *job) {
    return job->image_width <= MAX_SIDE && job->image_height <= MAX_SIDE && job->width > 0 &&
           job->height > 0 && job->width <= MAX_SIDE && job->height <= MAX_SIDE &&
           inside(job->box, job->image_width, job->image_height) &&
           inside(job->window, job->width, job->height) &&
           (job->kernel == BILINEAR || job->kernel == BICUBIC);
}

static Job job_from(const int32_t *row, const Work *work, uint8_t *out) {
    return (Job){
        .bytes = work->image.buf,
        .size = (size_t)work->image.len,
        .decoded = work->image.ndim == 3,
        .index = work->index.buf,
        .index_size = work->index.obj == NULL ? 0 : (size_t)work->index.len,
        .image_width = row[IMAGE_WIDTH],
        .image_height = row[IMAGE_HEIGHT],
        .box = {row[LEFT], row[TOP], row[RIGHT], row[BOTTOM]},
        .width = row[WIDTH],
        .height = row[HEIGHT],
        .window = {row[WINDOW_LEFT], row[WINDOW_TOP], row[WINDOW_RIGHT], row[WINDOW_BOTTOM]},
        .kernel = (Kernel)row[KERNEL],
        .flip = row[FLIP],
        .reduce = row[REDUCE],
        .out = out,
    };
}

static void release(Work *works, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if (works[i].image.obj != NULL) PyBuffer_Release(&works[i].image);
        if (works[i].index.obj != NULL) PyBuffer_Release(&works[i].index);
    }
    PyMem_Free(works);
}

/* The bytes of every image and, where there is one, of its index; NULL with an exception set. */
static Work *collect(PyObject *images, PyObject *indexes, Py_ssize_t count) {
    Work *works = PyMem_Calloc((size_t)count + 1, sizeof *works);
    if (works == NULL) return (Work *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *index = PyList_GET_ITEM(indexes, i);
        if (PyObject_GetBuffer(PyList_GET_ITEM(images, i), &works[i].image, PyBUF_ND) < 0 ||
            (index != Py_None && PyObject_GetBuffer(index, &works[i].index, PyBUF_SIMPLE) < 0)) {
            release(works, count);
            return NULL;
        }
    }
    return works;
}

static Status run(Work *works, const int32_t *rows, uint8_t *out, size_t each, Py_ssize_t count) {
    Decoder *decoder = decoder_create();
    if (decoder == NULL) return NO_MEMORY;
    Status worst = DONE;
    for (Py_ssize_t i = 0; i < count && worst != NO_MEMORY; i++) {
        Job job = job_from(rows + i * COLUMNS, &works[i], out + (size_t)i * each);
        works[i].status = decode_job(decoder, &job, works[i].message);
        if (works[i].status > worst) worst = works[i].status;
    }
    decoder_destroy(decoder);
    return worst;
}

static PyObject *answers(const Work *works, Py_ssize_t count) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        const char *message = works[i].message;
        PyObject *item =
            works[i].status == DONE
                ? Py_NewRef(Py_None)
                : PyUnicode_DecodeUTF8(message, (Py_ssize_t)strlen(message), "replace");
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, item);
    }
    return list;
}

/* Whether the shapes of jobs and output agree with one another and every job is possible. */
static int fits(const Py_buffer *jobs, const Py_buffer *out, const Work *works, Py_ssize_t count) {
    if (jobs->ndim != 2 || jobs->shape[0] != count || jobs->shape[1] != COLUMNS ||
        jobs->itemsize != 4 || out->ndim != 4 || out->shape[0] != count || out->shape[3] != 3 ||
        out->itemsize != 1)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Job job = job_from((const int32_t *)jobs->buf + i * COLUMNS, &works[i], NULL);
        const Py_ssize_t *shape = works[i].image.shape;
        if (job.decoded && (works[i].image.itemsize != 1 || shape[0] != job.image_height ||
                            shape[1] != job.image_width || shape[2] != 3))
            return 0;
        if (!valid(&job) || job.window.bottom - job.window.top != out->shape[1] ||
            job.window.right - job.window.left != out->shape[2])
            return 0;
    }
    return 1;
}

PyDoc_STRVAR(decode_doc,
             "decode(images, indexes, jobs, out) -> list\n--\n\n"
             "Decode a list of JPEG files, cut out, resize, mirror; uint8 [height, width, 3] in\n"
             "place of a file are its pixels, decoded.\n\n"
             "indexes holds None or `build_index(image)` for each image. jobs int32 [n, 15]:\n"
             "width and height of the image; left, top, right, bottom of what is cut out; width\n"
             "and height to which that is resized; left, top, right, bottom of what is kept of\n"
             "it; kernel (0 bilinear, 1 bicubic); whether to mirror; whether decoding at a\n"
             "fraction of the size is allowed. out uint8 [n, H, W, 3] is written to. Returns for\n"
             "each image None, or why it was not decoded, empty where that kind of file is not\n"
             "supported.");

static PyObject *decode(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *images, *indexes, *jobs_object, *out_object, *list = NULL;
    if (!PyArg_ParseTuple(arguments, "O!O!OO:decode", &PyList_Type, &images, &PyList_Type, &indexes,
                          &jobs_object, &out_object))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(images);
    if (PyList_GET_SIZE(indexes) != count)
        return PyErr_Format(PyExc_ValueError, "as many indexes as images are needed");
    Py_buffer jobs, out;
    if (PyObject_GetBuffer(jobs_object, &jobs, PyBUF_C_CONTIGUOUS) < 0) return NULL;
    if (PyObject_GetBuffer(out_object, &out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&jobs);
        return NULL;
    }
    Work *works = collect(images, indexes, count);
    if (works != NULL && !fits(&jobs, &out, works, count)) {
        PyErr_SetString(PyExc_ValueError, "jobs and out do not fit one another or the images");
    } else if (works != NULL) {
        Status worst;
        size_t each = count ? (size_t)(out.len / count) : 0;
        Py_BEGIN_ALLOW_THREADS
        worst = run(works, jobs.buf, out.buf, each, count);
        Py_END_ALLOW_THREADS
        list = worst == NO_MEMORY ? PyErr_NoMemory() : answers(works, count);
    }
    if (works != NULL) release(works, count);
    PyBuffer_Release(&out);
    PyBuffer_Release(&jobs);
    return list;
}

PyDoc_STRVAR(size_doc, "size(image) -> (width, height)\n--\n\n"
                       "Read the size of a JPEG file; raises ValueError if it is none.");

static PyObject *size(PyObject *module, PyObject *image) {
    (void)module;
    Py_buffer bytes;
    if (PyObject_GetBuffer(image, &bytes, PyBUF_SIMPLE) < 0) return NULL;
    int width = 0, height = 0;
    char message[MESSAGE_LENGTH] = "";
    Status status = NO_MEMORY;
    Py_BEGIN_ALLOW_THREADS
    Decoder *decoder = decoder_create();
    if (decoder != NULL)
        status = decode_size(decoder, bytes.buf, (size_t)bytes.len, &width, &height, message);
    decoder_destroy(decoder);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&bytes);
    if (status == NO_MEMORY) return PyErr_NoMemory();
    if (status == CORRUPT) return PyErr_Format(PyExc_ValueError, "%s", message);
    return Py_BuildValue("ii", width, height);
}

PyDoc_STRVAR(check_doc, "check(image)\n--\n\n"
                        "Read a JPEG file to its end marker; raises ValueError saying what is\n"
                        "wrong if a part of the image is missing or cannot be read.");

static PyObject *check(PyObject *module, PyObject *image) {
    (void)module;
    Py_buffer bytes;
    if (PyObject_GetBuffer(image, &bytes, PyBUF_SIMPLE) < 0) return NULL;
    char message[MESSAGE_LENGTH] = "";
    Status status = NO_MEMORY;
    Py_BEGIN_ALLOW_THREADS
    Decoder *decoder = decoder_create();
    if (decoder != NULL)
        status = decode_check(decoder, bytes.buf, (size_t)bytes.len, message);
    decoder_destroy(decoder);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&bytes);
    if (status == NO_MEMORY) return PyErr_NoMemory();
    if (status == CORRUPT) return PyErr_Format(PyExc_ValueError, "%s", message);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(build_index_doc,
             "build_index(image) -> bytes or None\n--\n\n"
             "Index where in a JPEG file its parts begin, so that `decode` can read some without\n"
             "the others. None where the file is not of a kind that can be indexed.");

static PyObject *build_index(PyObject *module, PyObject *image) {
    (void)module;
    Py_buffer bytes;
    if (PyObject_GetBuffer(image, &bytes, PyBUF_SIMPLE) < 0) return NULL;
    uint8_t *index = NULL;
    size_t index_size = 0;
    Status status;
    Py_BEGIN_ALLOW_THREADS
    status = index_build(bytes.buf, (size_t)bytes.len, &index, &index_size);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&bytes);
    if (status == NO_MEMORY) return PyErr_NoMemory();
    if (status != DONE) Py_RETURN_NONE;
    PyObject *result = PyBytes_FromStringAndSize((const char *)index, (Py_ssize_t)index_size);
    free(index);
    return result;
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, decode_doc},
    {"size", size, METH_O, size_doc},
    {"check", check, METH_O, check_doc},
    {"build_index", build_index, METH_O, build_index_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Decoding of JPEG files in parts.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
