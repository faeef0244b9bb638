/* hpcft.ckpt._engine: the engine and the checksum for Python. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <sys/types.h>
#include <unistd.h>

#include "crc32c.h"
#include "engine.h"

/* How long a wait goes on before Python may handle signals. */
#define SLICE 50000000ll

typedef struct {
    PyTypeObject *engine_type, *transfer_type, *loan_type;
    PyObject *elsewhere;
} module_state;

typedef struct {
    PyObject_HEAD
    engine *engine;
    PyObject *pin;
    pid_t pid; /* threads do not live on in a forked child */
} EngineObject;

typedef struct {
    PyObject_HEAD
    EngineObject *owner;
    job *job;
    PyObject *paths; /* tuple, for messages */
    Py_buffer *buffers;
    Py_ssize_t n_buffers;
    Py_ssize_t n_extents;
    int writing;
} TransferObject;

typedef struct {
    PyObject_HEAD
    TransferObject *transfer;
    loan *lent; /* NULL once it is given back */
    unsigned char *memory;
    size_t length;
    PyObject *pieces;
} LoanObject;

/* Whether this is the process the engine's threads run in; else an exception is set. */
static int at_home(EngineObject *self) {
    if (self->pid == getpid())
        return 1;
    PyErr_SetString(PyExc_RuntimeError,
                    "the engine belongs to the parent process; make a new one after fork");
    return 0;
}

static int usable(EngineObject *self) {
    if (!at_home(self))
        return 0;
    if (!self->engine) {
        PyErr_SetString(PyExc_ValueError, "the engine is closed");
        return 0;
    }
    return 1;
}

/* -- Transfer --------------------------------------------------------------------------------- */

static void release_buffers(TransferObject *self) {
    for (Py_ssize_t i = 0; i < self->n_buffers; i++)
        if (self->buffers[i].obj)
            PyBuffer_Release(&self->buffers[i]);
    PyMem_Free(self->buffers);
    self->buffers = NULL;
    self->n_buffers = 0;
}

static int transfer_traverse(TransferObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->owner);
    Py_VISIT(self->paths);
    for (Py_ssize_t i = 0; i < self->n_buffers; i++)
        Py_VISIT(self->buffers[i].obj);
    return 0;
}

static void transfer_dealloc(TransferObject *self) {
    PyObject_GC_UnTrack(self);
    /* In a forked child the job's threads do not exist, and it is as it was at the fork. */
    if (self->job && self->owner->pid == getpid()) {
        job *j = self->job;
        Py_BEGIN_ALLOW_THREADS
        job_free(j);
        Py_END_ALLOW_THREADS
    }
    release_buffers(self);
    Py_CLEAR(self->paths);
    Py_CLEAR(self->owner);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Raise what the job has failed of. Returns -1 if it has, else 0. */
static int raise_failure(TransferObject *self) {
    job_failure failure = job_failed(self->job);
    if (!failure.number)
        return 0;
    if (failure.number == ECANCELED) {
        PyErr_SetString(PyExc_InterruptedError, "the transfer was cancelled");
        return -1;
    }
    PyObject *path = PyTuple_GetItem(self->paths, (Py_ssize_t)failure.file);
    if (!path)
        return -1;
    PyObject *error;
    if (failure.number == ENODATA)
        error = PyObject_CallFunction(PyExc_EOFError, "N",
                                      PyUnicode_FromFormat("%S ends too early", path));
    else
        error = PyObject_CallFunction(
            PyExc_OSError, "iNO", failure.number,
            PyUnicode_FromFormat("%s failed: %s", failure.doing, strerror(failure.number)), path);
    if (!error)
        return -1;
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return -1;
}

/* Seconds or None as nanoseconds. Returns 0, or -1 with an exception. */
static int parse_timeout(PyObject *timeout, int64_t *nanoseconds) {
    *nanoseconds = INT64_MAX;
    if (timeout == Py_None)
        return 0;
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred())
        return -1;
    *nanoseconds = seconds <= 0 ? 0 : seconds > 1e9 ? INT64_MAX : (int64_t)(seconds * 1e9);
    return 0;
}

/* Wait for a stage. Returns 1 when it is reached, 0 when time is out, -1 with an exception. */
static int wait_for(TransferObject *self, job_stage stage, PyObject *timeout) {
    int64_t left;
    if (!at_home(self->owner) || parse_timeout(timeout, &left))
        return -1;
    for (;;) {
        int64_t slice = left < SLICE ? left : SLICE;
        int reached;
        Py_BEGIN_ALLOW_THREADS
        reached = job_wait(self->job, stage, slice);
        Py_END_ALLOW_THREADS
        if (reached)
            return 1;
        if (PyErr_CheckSignals())
            return -1;
        if (left != INT64_MAX)
            left -= slice;
        if (left <= 0)
            return 0;
    }
}

static PyObject *wait_until_reached(TransferObject *self, PyObject *args, PyObject *kwargs,
                                    job_stage stage) {
    static char *names[] = {"timeout", NULL};
    PyObject *timeout = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", names, &timeout))
        return NULL;
    int reached = wait_for(self, stage, timeout);
    if (reached < 0)
        return NULL;
    if (reached) {
        /* What was to be written is copied, so the sources may change and go now. */
        if (self->writing || stage == JOB_DONE)
            release_buffers(self);
        if (raise_failure(self))
            return NULL;
    }
    return PyBool_FromLong(reached);
}

static PyObject *transfer_wait_copied(TransferObject *self, PyObject *args, PyObject *kwargs) {
    return wait_until_reached(self, args, kwargs, JOB_COPIED);
}

static PyObject *transfer_wait(TransferObject *self, PyObject *args, PyObject *kwargs) {
    return wait_until_reached(self, args, kwargs, JOB_DONE);
}

static PyObject *transfer_progress(TransferObject *self, PyObject *Py_UNUSED(ignored)) {
    if (!at_home(self->owner))
        return NULL;
    job_progress p = job_look(self->job);
    return Py_BuildValue("KKKO", (unsigned long long)p.total, (unsigned long long)p.copied,
                         (unsigned long long)p.moved, p.done ? Py_True : Py_False);
}

static PyObject *transfer_checksums(TransferObject *self, PyObject *Py_UNUSED(ignored)) {
    if (!at_home(self->owner))
        return NULL;
    if (!job_look(self->job).done) {
        PyErr_SetString(PyExc_ValueError, "the transfer is not done yet");
        return NULL;
    }
    if (raise_failure(self))
        return NULL;
    PyObject *sums = PyList_New(self->n_extents);
    if (!sums)
        return NULL;
    for (Py_ssize_t i = 0; i < self->n_extents; i++) {
        PyObject *sum = PyLong_FromUnsignedLong(job_checksum(self->job, (size_t)i));
        if (!sum) {
            Py_DECREF(sums);
            return NULL;
        }
        PyList_SET_ITEM(sums, i, sum);
    }
    return sums;
}

static PyObject *transfer_cancel(TransferObject *self, PyObject *Py_UNUSED(ignored)) {
    if (!at_home(self->owner))
        return NULL;
    job_cancel(self->job);
    Py_RETURN_NONE;
}

static PyObject *loan_of(TransferObject *self, loan *lent);

static PyObject *transfer_borrow(TransferObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"timeout", NULL};
    PyObject *timeout = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", names, &timeout))
        return NULL;
    int64_t left;
    if (!at_home(self->owner) || parse_timeout(timeout, &left))
        return NULL;
    for (;;) {
        int64_t slice = left < SLICE ? left : SLICE;
        loan *lent;
        int over;
        Py_BEGIN_ALLOW_THREADS
        lent = job_borrow(self->job, slice, &over);
        Py_END_ALLOW_THREADS
        if (lent)
            return loan_of(self, lent);
        if (over)
            Py_RETURN_NONE;
        if (PyErr_CheckSignals())
            return NULL;
        if (left != INT64_MAX)
            left -= slice;
        if (left <= 0) {
            PyErr_SetString(PyExc_TimeoutError, "no chunk can be lent yet");
            return NULL;
        }
    }
}

PyDoc_STRVAR(transfer_doc,
             "Data on its way between memory and files; made by Engine.write and Engine.read.\n\n"
             "Dropping the last reference cancels what has not been begun.");

static PyMethodDef transfer_methods[] = {
    {"wait_copied", (PyCFunction)(void (*)(void))transfer_wait_copied, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("wait_copied($self, /, timeout=None)\n--\n\n"
               "Wait until the sources are copied and may change.\n\n"
               "Parameters\n----------\ntimeout: seconds; None waits for ever.\n\n"
               "Returns\n-------\nWhether they are.\n\n"
               "Raises\n------\nOSError: the transfer has failed; names cause and file.\n"
               "InterruptedError: it was cancelled.")},
    {"wait", (PyCFunction)(void (*)(void))transfer_wait, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("wait($self, /, timeout=None)\n--\n\n"
               "Wait until all is done, flushing included.\n\n"
               "Parameters\n----------\ntimeout: seconds; None waits for ever.\n\n"
               "Returns\n-------\nWhether it is.\n\n"
               "Raises\n------\nOSError: the transfer has failed; names cause and file.\n"
               "EOFError: a file is shorter than what was to be read.\n"
               "InterruptedError: it was cancelled.")},
    {"progress", (PyCFunction)transfer_progress, METH_NOARGS,
     PyDoc_STR("progress($self, /)\n--\n\n"
               "How far it is.\n\nReturns\n-------\n"
               "(total, copied, moved, done): bytes, bytes, bytes, whether it is over.")},
    {"checksums", (PyCFunction)transfer_checksums, METH_NOARGS,
     PyDoc_STR("checksums($self, /)\n--\n\n"
               "CRC-32C of every extent, in order, once all is done.\n\n"
               "Raises\n------\nValueError: it is not.\nOSError: the transfer has failed.")},
    {"borrow", (PyCFunction)(void (*)(void))transfer_borrow, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("borrow($self, /, timeout=None)\n--\n\n"
               "Get a stretch of the pool for what is elsewhere, in a transfer that has such: to\n"
               "be filled if it writes, else to be emptied.\n\n"
               "Parameters\n----------\ntimeout: seconds; None waits for ever.\n\n"
               "Returns\n-------\n"
               "The Loan; None if none will come any more.\n\n"
               "Raises\n------\nTimeoutError: time is out.")},
    {"cancel", (PyCFunction)transfer_cancel, METH_NOARGS,
     PyDoc_STR("cancel($self, /)\n--\n\nLeave out what has not been begun.")},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot transfer_slots[] = {
    {Py_tp_doc, (void *)transfer_doc},
    {Py_tp_dealloc, transfer_dealloc},
    {Py_tp_traverse, transfer_traverse},
    {Py_tp_methods, transfer_methods},
    {0, NULL},
};

static PyType_Spec transfer_spec = {
    .name = "hpcft.ckpt._engine.Transfer",
    .basicsize = sizeof(TransferObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = transfer_slots,
};

/* -- Loan ------------------------------------------------------------------------------------- */

static int loan_traverse(LoanObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->transfer);
    Py_VISIT(self->pieces);
    return 0;
}

/* What is lent must come back, or the engine waits for it for ever. */
static void give_back(LoanObject *self, int useless) {
    loan *lent = self->lent;
    self->lent = NULL;
    if (!lent || self->transfer->owner->pid != getpid())
        return;
    job *j = self->transfer->job;
    Py_BEGIN_ALLOW_THREADS
    if (useless)
        job_cancel(j);
    job_give_back(lent);
    Py_END_ALLOW_THREADS
}

static void loan_dealloc(LoanObject *self) {
    PyObject_GC_UnTrack(self);
    give_back(self, 1);
    Py_CLEAR(self->pieces);
    Py_CLEAR(self->transfer);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *loan_pieces(loan *lent) {
    PyObject *list = PyList_New(0);
    loan_piece found;
    for (size_t i = 0; list && loan_look(lent, i, &found); i++) {
        PyObject *one = Py_BuildValue("nKII", (Py_ssize_t)found.extent,
                                      (unsigned long long)found.begin, found.place, found.length);
        if (!one || PyList_Append(list, one))
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

static PyObject *loan_of(TransferObject *transfer, loan *lent) {
    module_state *state = PyType_GetModuleState(Py_TYPE(transfer));
    LoanObject *self = (LoanObject *)state->loan_type->tp_alloc(state->loan_type, 0);
    if (!self) {
        job_cancel(transfer->job);
        job_give_back(lent);
        return NULL;
    }
    Py_INCREF(transfer);
    self->transfer = transfer;
    self->lent = lent;
    self->memory = loan_memory(lent, &self->length);
    self->pieces = loan_pieces(lent);
    if (!self->pieces)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static PyObject *loan_give_back(LoanObject *self, PyObject *Py_UNUSED(ignored)) {
    give_back(self, 0);
    Py_RETURN_NONE;
}

static PyObject *loan_get_pieces(LoanObject *self, void *Py_UNUSED(closure)) {
    return Py_NewRef(self->pieces);
}

static int loan_get_buffer(LoanObject *self, Py_buffer *view, int flags) {
    if (!self->lent) {
        view->obj = NULL;
        PyErr_SetString(PyExc_ValueError, "the loan has been given back");
        return -1;
    }
    return PyBuffer_FillInfo(view, (PyObject *)self, self->memory, (Py_ssize_t)self->length, 0,
                             flags);
}

PyDoc_STRVAR(loan_doc, "A stretch of an engine's pool, as a buffer; made by Transfer.borrow.\n\n"
                       "Dropped without having been given back, it cancels the transfer.");

static PyMethodDef loan_methods[] = {
    {"give_back", (PyCFunction)loan_give_back, METH_NOARGS,
     PyDoc_STR("give_back($self, /)\n--\n\n"
               "It is filled, or emptied; its memory must not be used any more.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef loan_getset[] = {
    {"pieces", (getter)loan_get_pieces, NULL,
     PyDoc_STR("What is elsewhere: (extent, place in the extent, place in the loan, length)."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot loan_slots[] = {
    {Py_tp_doc, (void *)loan_doc},
    {Py_tp_dealloc, loan_dealloc},
    {Py_tp_traverse, loan_traverse},
    {Py_tp_methods, loan_methods},
    {Py_tp_getset, loan_getset},
    {Py_bf_getbuffer, loan_get_buffer},
    {0, NULL},
};

static PyType_Spec loan_spec = {
    .name = "hpcft.ckpt._engine.Loan",
    .basicsize = sizeof(LoanObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = loan_slots,
};

/* -- Engine ----------------------------------------------------------------------------------- */

static PyObject *engine_make(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"pool",      "chunk",    "copiers", "movers", "depth",
                            "bandwidth", "niceness", "cpus",    NULL};
    Py_ssize_t pool = 0, chunk = 4 << 20;
    int copiers = 2, movers = 4, depth = 4, niceness = 0;
    unsigned long long bandwidth = 0;
    PyObject *cpus = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n|$niiiKiO", names, &pool, &chunk, &copiers,
                                     &movers, &depth, &bandwidth, &niceness, &cpus))
        return NULL;
    if (chunk < ENGINE_PAGE || chunk % ENGINE_PAGE || chunk > 1 << 30)
        return PyErr_Format(PyExc_ValueError, "chunk must be a multiple of %d, at most 1 GiB",
                            ENGINE_PAGE);
    if (pool < chunk)
        return PyErr_Format(PyExc_ValueError, "the pool must hold at least one chunk");
    if (copiers < 1 || movers < 1 || copiers > 256 || movers > 256 || depth < 0 || depth > 256)
        return PyErr_Format(PyExc_ValueError, "threads must be 1 to 256, depth 0 to 256");
    engine_options options = {.pool = (size_t)(pool / chunk * chunk),
                              .chunk = (size_t)chunk,
                              .copiers = copiers,
                              .movers = movers,
                              .depth = (unsigned)depth,
                              .bandwidth = bandwidth,
                              .niceness = niceness};
    int *numbers = NULL;
    if (cpus && cpus != Py_None) {
        PyObject *list = PySequence_List(cpus);
        if (!list)
            return NULL;
        options.n_cpus = (size_t)PyList_GET_SIZE(list);
        numbers = PyMem_Calloc(options.n_cpus + 1, sizeof *numbers);
        if (!numbers) {
            Py_DECREF(list);
            return PyErr_NoMemory();
        }
        for (size_t i = 0; i < options.n_cpus; i++) {
            long number = PyLong_AsLong(PyList_GET_ITEM(list, (Py_ssize_t)i));
            if (number < 0 || number > 1023) {
                if (!PyErr_Occurred())
                    PyErr_SetString(PyExc_ValueError, "processor numbers go from 0 to 1023");
                Py_DECREF(list);
                PyMem_Free(numbers);
                return NULL;
            }
            numbers[i] = (int)number;
        }
        Py_DECREF(list);
        options.cpus = numbers;
    }
    EngineObject *self = (EngineObject *)type->tp_alloc(type, 0);
    if (self) {
        int number;
        Py_BEGIN_ALLOW_THREADS
        number = engine_new(&options, &self->engine);
        Py_END_ALLOW_THREADS
        self->pid = getpid();
        if (number) {
            self->engine = NULL;
            Py_CLEAR(self);
            errno = number;
            PyErr_SetFromErrno(PyExc_OSError);
        }
    }
    PyMem_Free(numbers);
    return (PyObject *)self;
}

static int engine_traverse(EngineObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->pin);
    return 0;
}

static void close_engine(EngineObject *self) {
    engine *e = self->engine;
    /* Before the pool goes. */
    Py_CLEAR(self->pin);
    self->engine = NULL;
    if (e && self->pid == getpid())
        engine_close(e);
}

static void engine_dealloc(EngineObject *self) {
    PyObject_GC_UnTrack(self);
    close_engine(self);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *engine_close_method(EngineObject *self, PyObject *Py_UNUSED(ignored)) {
    close_engine(self);
    Py_RETURN_NONE;
}

/* Take (path, buffered, direct) apart. Returns 0, or -1 with an exception. */
static int parse_files(PyObject *list, engine_file *files, PyObject *paths) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        PyObject *path;
        PyObject *item = PyList_GET_ITEM(list, i);
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_TypeError, "a file is (path, descriptor, direct descriptor)");
            return -1;
        }
        if (!PyArg_ParseTuple(item, "Oii", &path, &files[i].buffered, &files[i].direct))
            return -1;
        Py_INCREF(path);
        PyTuple_SET_ITEM(paths, i, path);
    }
    return 0;
}

static int out_of_order(const engine_extent *before, const engine_extent *x) {
    return x->file < before->file ||
           (x->file == before->file && x->offset < before->offset + before->length);
}

/* Take (buffer, file, offset, length) apart, getting hold of the buffers. */
static int parse_extents(TransferObject *transfer, PyObject *list, engine_extent *extents,
                         Py_ssize_t n_files) {
    module_state *state = PyType_GetModuleState(Py_TYPE(transfer));
    PyObject *elsewhere = state->elsewhere;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        PyObject *memory;
        unsigned long long offset, length;
        Py_ssize_t file;
        PyObject *item = PyList_GET_ITEM(list, i);
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_TypeError, "an extent is (buffer, file, offset, length)");
            return -1;
        }
        if (!PyArg_ParseTuple(item, "OnKK", &memory, &file, &offset, &length))
            return -1;
        engine_extent *x = &extents[i];
        *x = (engine_extent){NULL, offset, length, (uint32_t)file, 0};
        if (file < 0 || file >= n_files) {
            PyErr_Format(PyExc_ValueError, "extent %zd: there is no file %zd", i, file);
            return -1;
        }
        if (offset > INT64_MAX || length > INT64_MAX - offset) {
            PyErr_Format(PyExc_ValueError, "extent %zd: no file is as large", i);
            return -1;
        }
        if (i && out_of_order(&extents[i - 1], x)) {
            PyErr_Format(PyExc_ValueError, "extent %zd lies before the end of the one before", i);
            return -1;
        }
        if (memory == elsewhere) {
            x->elsewhere = 1;
        } else if (memory != Py_None) {
            Py_buffer *buffer = &transfer->buffers[i];
            int flags = transfer->writing ? PyBUF_SIMPLE : PyBUF_WRITABLE;
            if (PyObject_GetBuffer(memory, buffer, flags))
                return -1;
            if ((unsigned long long)buffer->len != length) {
                PyErr_Format(PyExc_ValueError, "extent %zd: %llu bytes of a buffer of %zd", i,
                             length, buffer->len);
                return -1;
            }
            x->memory = buffer->buf;
        }
    }
    return 0;
}

static PyObject *begin(EngineObject *self, int writing, PyObject *file_list, PyObject *extent_list,
                       int sync) {
    if (!usable(self))
        return NULL;
    module_state *state = PyType_GetModuleState(Py_TYPE(self));
    TransferObject *transfer = NULL;
    engine_file *files = NULL;
    engine_extent *extents = NULL;
    PyObject *result = NULL;
    PyObject *files_in = PySequence_List(file_list);
    PyObject *extents_in = files_in ? PySequence_List(extent_list) : NULL;
    if (!extents_in)
        goto end;
    Py_ssize_t n_files = PyList_GET_SIZE(files_in), n_extents = PyList_GET_SIZE(extents_in);
    transfer = (TransferObject *)state->transfer_type->tp_alloc(state->transfer_type, 0);
    if (!transfer)
        goto end;
    Py_INCREF(self);
    transfer->owner = self;
    transfer->writing = writing;
    transfer->n_extents = n_extents;
    transfer->paths = PyTuple_New(n_files);
    transfer->buffers = PyMem_Calloc((size_t)n_extents + 1, sizeof *transfer->buffers);
    files = PyMem_Calloc((size_t)n_files + 1, sizeof *files);
    extents = PyMem_Calloc((size_t)n_extents + 1, sizeof *extents);
    if (!transfer->paths)
        goto end;
    if (!transfer->buffers || !files || !extents) {
        PyErr_NoMemory();
        goto end;
    }
    transfer->n_buffers = n_extents;
    if (parse_files(files_in, files, transfer->paths) ||
        parse_extents(transfer, extents_in, extents, n_files))
        goto end;
    engine *e = self->engine;
    int number;
    Py_BEGIN_ALLOW_THREADS
    number = job_begin(e, writing, files, (uint32_t)n_files, extents, (size_t)n_extents, sync,
                       &transfer->job);
    Py_END_ALLOW_THREADS
    if (number) {
        errno = number;
        PyErr_SetFromErrno(PyExc_OSError);
        goto end;
    }
    result = (PyObject *)transfer;
    transfer = NULL;
end:
    Py_XDECREF(transfer);
    Py_XDECREF(files_in);
    Py_XDECREF(extents_in);
    PyMem_Free(files);
    PyMem_Free(extents);
    return result;
}

static PyObject *engine_write(EngineObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"files", "extents", "sync", NULL};
    PyObject *files, *extents;
    int sync = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$p", names, &files, &extents, &sync))
        return NULL;
    return begin(self, 1, files, extents, sync);
}

static PyObject *engine_read(EngineObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"files", "extents", NULL};
    PyObject *files, *extents;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &files, &extents))
        return NULL;
    return begin(self, 0, files, extents, 0);
}

static PyObject *engine_get_backend(EngineObject *self, void *Py_UNUSED(closure)) {
    return usable(self) ? PyUnicode_FromString(engine_backend(self->engine)) : NULL;
}

static PyObject *engine_get_peak(EngineObject *self, void *Py_UNUSED(closure)) {
    return usable(self) ? PyLong_FromSize_t(engine_peak(self->engine)) : NULL;
}

static PyObject *engine_get_pool(EngineObject *self, void *Py_UNUSED(closure)) {
    if (!usable(self))
        return NULL;
    size_t size;
    void *pool = engine_pool(self->engine, &size);
    return Py_BuildValue("Nn", PyLong_FromVoidPtr(pool), (Py_ssize_t)size);
}

static PyObject *engine_get_pin(EngineObject *self, void *Py_UNUSED(closure)) {
    return Py_NewRef(self->pin ? self->pin : Py_None);
}

static int engine_set_pin(EngineObject *self, PyObject *pin, void *Py_UNUSED(closure)) {
    if (!usable(self))
        return -1;
    PyObject *before = self->pin;
    self->pin = Py_XNewRef(pin);
    Py_XDECREF(before);
    return 0;
}

PyDoc_STRVAR(engine_doc,
             "Engine(pool, *, chunk=4194304, copiers=2, movers=4, depth=4, bandwidth=0,\n"
             "       niceness=0, cpus=None)\n--\n\n"
             "Threads that move memory to files and back, without the interpreter's lock.\n\n"
             "Parameters\n----------\n"
             "pool: bytes of staging memory, all that it ever uses for data.\n"
             "chunk: bytes moved at a time, a multiple of 4096.\n"
             "copiers: threads that copy what is to be written into the pool.\n"
             "movers: threads that compute checksums, write and read.\n"
             "depth: transfers a mover has under way with io_uring; 0 does without it, as does a\n"
             "    kernel that has none or does not allow it.\n"
             "bandwidth: bytes a second to write at most; 0 is no limit.\n"
             "niceness: added to that of the process for the movers.\n"
             "cpus: processors the threads may run on; None is all.\n\n"
             "Raises\n------\nOSError: threads or memory cannot be had.");

static PyMethodDef engine_methods[] = {
    {"write", (PyCFunction)(void (*)(void))engine_write, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR(
         "write($self, /, files, extents, *, sync=True)\n--\n\n"
         "Begin to write.\n\n"
         "Parameters\n----------\n"
         "files: (path, descriptor, descriptor with O_DIRECT or -1) each; they may be closed\n"
         "    at once.\n"
         "extents: (buffer or None for zeros, index of the file, offset, length in bytes)\n"
         "    each, in order of file and offset, without overlap. In place of a buffer\n"
         "    ELSEWHERE: the caller borrows chunks, and brings what is to be written.\n"
         "sync: fsync the files at the end.\n\n"
         "Returns\n-------\nThe Transfer.")},
    {"read", (PyCFunction)(void (*)(void))engine_read, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("read($self, /, files, extents)\n--\n\n"
               "Begin to read; as write. The buffer None stands for bytes to be read for their\n"
               "checksum only.\n\n"
               "Returns\n-------\nThe Transfer.")},
    {"close", (PyCFunction)engine_close_method, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\n"
               "Have the threads end. Does not wait for them; what is not copied yet fails.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef engine_getset[] = {
    {"pool", (getter)engine_get_pool, NULL,
     PyDoc_STR("(address, bytes) of the pool, which is there until the engine is closed."), NULL},
    {"backend", (getter)engine_get_backend, NULL, PyDoc_STR("\"io_uring\" or \"threads\"."), NULL},
    {"pin", (getter)engine_get_pin, (setter)engine_set_pin,
     PyDoc_STR("What keeps the pool in place for devices; let go before the pool goes."), NULL},
    {"peak", (getter)engine_get_peak, NULL,
     PyDoc_STR("Bytes of the pool that were in use at the same time, at most."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_doc, (void *)engine_doc},
    {Py_tp_new, engine_make},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_traverse, engine_traverse},
    {Py_tp_methods, engine_methods},
    {Py_tp_getset, engine_getset},
    {0, NULL},
};

static PyType_Spec engine_spec = {
    .name = "hpcft.ckpt._engine.Engine",
    .basicsize = sizeof(EngineObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = engine_slots,
};

/* -- the module ------------------------------------------------------------------------------- */

static PyObject *checksum_of(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer data;
    unsigned int before = 0;
    if (!PyArg_ParseTuple(args, "y*|I", &data, &before))
        return NULL;
    uint32_t sum;
    Py_BEGIN_ALLOW_THREADS
    sum = crc32c(before, data.buf, (size_t)data.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(sum);
}

static PyObject *checksum_combined(PyObject *Py_UNUSED(module), PyObject *args) {
    unsigned int first, second;
    unsigned long long length;
    if (!PyArg_ParseTuple(args, "IIK", &first, &second, &length))
        return NULL;
    return PyLong_FromUnsignedLong(crc32c_combine(first, second, length));
}

static PyObject *exclusive_or(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer into, data;
    if (!PyArg_ParseTuple(args, "w*y*", &into, &data))
        return NULL;
    int fits = into.len >= data.len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        unsigned char *to = into.buf;
        const unsigned char *from = data.buf;
        for (Py_ssize_t i = 0; i < data.len; i++)
            to[i] ^= from[i];
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "there is more data than memory");
    }
    PyBuffer_Release(&into);
    PyBuffer_Release(&data);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"exclusive_or", exclusive_or, METH_VARARGS,
     PyDoc_STR("exclusive_or($module, into, data, /)\n--\n\n"
               "Change the first bytes of `into` to the exclusive or of them and `data`.")},
    {"crc32c", checksum_of, METH_VARARGS,
     PyDoc_STR("crc32c($module, data, before=0, /)\n--\n\n"
               "CRC-32C (RFC 3720, appendix B.4) of the data, or of it after data whose checksum\n"
               "is `before`.")},
    {"crc32c_combine", checksum_combined, METH_VARARGS,
     PyDoc_STR("crc32c_combine($module, first, second, length, /)\n--\n\n"
               "Checksum of two stretches of data from that of each; `length` is the second's.")},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    static pthread_once_t once = PTHREAD_ONCE_INIT; /* not once an interpreter */
    module_state *state = PyModule_GetState(module);
    pthread_once(&once, crc32c_start);
    state->engine_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &engine_spec, NULL);
    if (!state->engine_type || PyModule_AddType(module, state->engine_type))
        return -1;
    state->transfer_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &transfer_spec, NULL);
    if (!state->transfer_type || PyModule_AddType(module, state->transfer_type))
        return -1;
    state->loan_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &loan_spec, NULL);
    if (!state->loan_type || PyModule_AddType(module, state->loan_type))
        return -1;
    state->elsewhere = PyObject_CallNoArgs((PyObject *)&PyBaseObject_Type);
    if (!state->elsewhere || PyModule_AddObjectRef(module, "ELSEWHERE", state->elsewhere))
        return -1;
    return PyModule_AddStringConstant(module, "CRC32C_BACKEND", crc32c_backend());
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->transfer_type);
    Py_VISIT(state->loan_type);
    Py_VISIT(state->elsewhere);
    return 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->transfer_type);
    Py_CLEAR(state->loan_type);
    Py_CLEAR(state->elsewhere);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "hpcft.ckpt._engine",
    .m_doc = "Moves memory to files and back in threads of its own.",
    .m_size = sizeof(module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__engine(void) {
    return PyModuleDef_Init(&module_definition);
}
