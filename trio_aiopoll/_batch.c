/* The extension module _batch: what tasks have asked their sockets to receive and to send, and one call that does it all.
 *
 * _transfer.c meets the kernel, and this file Python. It is not made by cffi like the rest of the C core, because what
 * comes and goes here are objects: cffi would have Python code make integers and pointers of them, around each call and
 * for each operation. That, and the dictionaries in which the operations were kept, took 2 us of the 11 that an echo
 * between 16 connections took.
 *
 * Of Trio it knows nothing. A task, and the trap that a task yields to its scheduler, are objects that come in and go out
 * again. A batch and its places belong to the one thread that has the run; while operations are performed, others may have
 * the GIL, but nothing of the batch. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <stdint.h>

#include "_transfer.h"

/* Each receive needs room for all that it may bring. Used from the front, so of most calls only a few pages. */
#define RECEIVES_IN_ARENA 8
#define AT_ONCE 256

enum direction { RECEIVE, SEND };
enum order { NO_ORDER, SENDS_FIRST, RECEIVES_FIRST };

struct place;

struct queue {
    struct place **places; /* strong references */
    Py_ssize_t count;
    Py_ssize_t capacity;
};

struct batch {
    PyObject_HEAD
    PyObject *owner;
    PyObject *waiting;
    PyObject *fileno; /* the method's name */
    Py_ssize_t max_receive;
    Py_ssize_t max_send;
    char *arena;
    int is_open[2];
    int is_performing;
    enum order order;
    struct queue queues[2];
};

struct place {
    PyObject_HEAD
    struct batch *batch; /* NULL if the place is closed and nothing of it is in the batch any more */
    int is_closed;
    PyObject *keys[2]; /* ints: to look them up runs no Python code */
    PyObject *traps[2];
    /* of the operations that are in the batch; no task: no operation */
    PyObject *tasks[2];
    PyObject *sockets[2];
    PyObject *data;
};

/* ---- queues ---- */

static int queue_push(struct queue *queue, struct place *place)
{
    if (queue->count == queue->capacity) {
        Py_ssize_t capacity = queue->capacity ? 2 * queue->capacity : 16;
        struct place **places = PyMem_Realloc(queue->places, (size_t)capacity * sizeof(*places));
        if (places == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        queue->places = places;
        queue->capacity = capacity;
    }
    Py_INCREF(place);
    queue->places[queue->count++] = place;
    return 0;
}

static void queue_remove(struct queue *queue, struct place *place)
{
    Py_ssize_t i = queue->count;
    do {
        if (i == 0)
            return;
    } while (queue->places[--i] != place);
    for (queue->count--; i < queue->count; i++)
        queue->places[i] = queue->places[i + 1];
    Py_DECREF(place);
}

static void queue_clear(struct queue *queue)
{
    struct queue old = *queue;
    *queue = (struct queue){0};
    for (Py_ssize_t i = 0; i < old.count; i++)
        Py_DECREF(old.places[i]);
    PyMem_Free(old.places);
}

/* ---- a place ---- */

static void leave_if_closed(struct place *self)
{
    if (self->is_closed && self->tasks[RECEIVE] == NULL && self->tasks[SEND] == NULL)
        Py_CLEAR(self->batch);
}

/* Ends the operation. The caller owns the task, which is returned. */
static PyObject *take_task(struct place *self, int direction)
{
    PyObject *task = self->tasks[direction];
    self->tasks[direction] = NULL;
    Py_CLEAR(self->sockets[direction]);
    if (direction == SEND)
        Py_CLEAR(self->data);
    leave_if_closed(self);
    return task;
}

static int place_traverse(struct place *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->batch);
    for (int direction = 0; direction < 2; direction++) {
        Py_VISIT(self->traps[direction]);
        Py_VISIT(self->tasks[direction]);
        Py_VISIT(self->sockets[direction]);
    }
    return 0;
}

static int place_clear(struct place *self)
{
    self->is_closed = 1;
    Py_CLEAR(self->batch);
    for (int direction = 0; direction < 2; direction++) {
        Py_CLEAR(self->traps[direction]);
        Py_XDECREF(take_task(self, direction));
    }
    return 0;
}

static void place_dealloc(struct place *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    place_clear(self);
    Py_XDECREF(self->keys[RECEIVE]);
    Py_XDECREF(self->keys[SEND]);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *place_set_traps(struct place *self, PyObject *args)
{
    PyObject *traps[2];
    if (!PyArg_ParseTuple(args, "OO:set_traps", &traps[RECEIVE], &traps[SEND]))
        return NULL;
    if (self->is_closed) {
        PyErr_SetString(PyExc_RuntimeError, "the place is closed");
        return NULL;
    }
    if (traps[RECEIVE] == Py_None || traps[SEND] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "a trap must not be None, which stands for an operation that has not begun");
        return NULL;
    }
    for (int direction = 0; direction < 2; direction++) {
        PyObject *old = self->traps[direction];
        self->traps[direction] = Py_NewRef(traps[direction]);
        Py_XDECREF(old);
    }
    Py_RETURN_NONE;
}

/* Whether an operation in this direction may come into the batch now; -1: an exception. */
static int may_begin(struct place *self, int direction, const PyObject *owner)
{
    struct batch *batch = self->batch;
    if (self->is_closed || owner != batch->owner || !batch->is_open[direction] || batch->is_performing)
        return 0;
    if (self->tasks[direction] != NULL || self->traps[direction] == NULL)
        return 0;
    int is_waiting = PyDict_Contains(batch->waiting, self->keys[direction]);
    if (is_waiting != 0)
        return is_waiting < 0 ? -1 : 0;
    if (self->tasks[!direction] != NULL) { /* they are to be performed in the order in which they have come */
        enum order order = direction == RECEIVE ? SENDS_FIRST : RECEIVES_FIRST;
        if (batch->order != NO_ORDER && batch->order != order)
            return 0;
        batch->order = order;
    }
    return 1;
}

static PyObject *begin(struct place *self, int direction, PyObject *const *args)
{
    int may = may_begin(self, direction, args[0]);
    if (may < 0)
        return NULL;
    if (!may)
        Py_RETURN_NONE;
    if (queue_push(&self->batch->queues[direction], self) < 0)
        return NULL;
    self->tasks[direction] = Py_NewRef(args[1]);
    self->sockets[direction] = Py_NewRef(args[2]);
    if (direction == SEND)
        self->data = Py_NewRef(args[3]);
    return Py_NewRef(self->traps[direction]);
}

static PyObject *place_begin_receive(struct place *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "begin_receive takes owner, task and socket");
        return NULL;
    }
    return begin(self, RECEIVE, args);
}

static PyObject *place_begin_send(struct place *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !PyBytes_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError, "begin_send takes owner, task, socket and data, which must be bytes");
        return NULL;
    }
    if (!self->is_closed && PyBytes_Size(args[3]) > self->batch->max_send)
        Py_RETURN_NONE;
    return begin(self, SEND, args);
}

static int parse_direction(PyObject *argument)
{
    long direction = PyLong_AsLong(argument);
    if (direction == RECEIVE || direction == SEND)
        return (int)direction;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "direction must be 0, to receive, or 1, to send, not %ld", direction);
    return -1;
}

static PyObject *place_task(struct place *self, PyObject *argument)
{
    int direction = parse_direction(argument);
    if (direction < 0)
        return NULL;
    PyObject *task = self->tasks[direction];
    return Py_NewRef(task == NULL ? Py_None : task);
}

static PyObject *place_socket(struct place *self, PyObject *argument)
{
    int direction = parse_direction(argument);
    if (direction < 0)
        return NULL;
    PyObject *socket = self->sockets[direction];
    return Py_NewRef(socket == NULL ? Py_None : socket);
}

static PyObject *place_withdraw(struct place *self, PyObject *argument)
{
    int direction = parse_direction(argument);
    if (direction < 0)
        return NULL;
    if (self->tasks[direction] == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "there is no operation to withdraw");
        return NULL;
    }
    if (self->batch->is_performing) {
        PyErr_SetString(PyExc_RuntimeError, "the operation is being performed");
        return NULL;
    }
    queue_remove(&self->batch->queues[direction], self);
    return take_task(self, direction);
}

static PyObject *place_close(struct place *self, PyObject *unused)
{
    (void)unused;
    self->is_closed = 1;
    for (int direction = 0; direction < 2; direction++)
        Py_CLEAR(self->traps[direction]); /* they refer back to us */
    leave_if_closed(self);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_traps_doc, "set_traps(receive, send, /)\n--\n\n\
What a task yields that has begun a receive, or a send. Until it is known, nothing can begin.");
PyDoc_STRVAR(begin_receive_doc, "begin_receive(owner, task, sock, /)\n--\n\n\
Have the next perform() receive for the task, which yields the trap that is returned here.\n\n\
Returns None if that cannot be: the owner is another one; the direction is not open, or has an operation already;\n\
somebody is waiting for its key; there is an operation of the other direction, and another order is to be kept; or the place is closed.");
PyDoc_STRVAR(begin_send_doc, "begin_send(owner, task, sock, data, /)\n--\n\n\
The same for sending; None also if the data are more than max_send.");
PyDoc_STRVAR(task_doc, "task(direction, /)\n--\n\nWhose operation is in the batch, or None.");
PyDoc_STRVAR(socket_doc, "socket(direction, /)\n--\n\nOn what the operation is that is in the batch, or None.");
PyDoc_STRVAR(withdraw_doc, "withdraw(direction, /)\n--\n\n\
Take the operation out of the batch, and return its task. RuntimeError: there is none.");
PyDoc_STRVAR(close_doc, "close()\n--\n\nLet no operation begin any more. What is in the batch stays there.");

static PyMethodDef place_methods[] = {
    {"set_traps", (PyCFunction)place_set_traps, METH_VARARGS, set_traps_doc},
    {"begin_receive", (PyCFunction)(void (*)(void))place_begin_receive, METH_FASTCALL, begin_receive_doc},
    {"begin_send", (PyCFunction)(void (*)(void))place_begin_send, METH_FASTCALL, begin_send_doc},
    {"task", (PyCFunction)place_task, METH_O, task_doc},
    {"socket", (PyCFunction)place_socket, METH_O, socket_doc},
    {"withdraw", (PyCFunction)place_withdraw, METH_O, withdraw_doc},
    {"close", (PyCFunction)place_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(place_doc, "What the tasks of one socket have asked it to do: at most one receive and one send.\n\n\
Its methods take the direction as 0 for receiving and 1 for sending.");

static PyType_Slot place_slots[] = {
    {Py_tp_doc, (void *)place_doc},
    {Py_tp_traverse, place_traverse},
    {Py_tp_clear, place_clear},
    {Py_tp_dealloc, place_dealloc},
    {Py_tp_methods, place_methods},
    {0, NULL},
};

static PyType_Spec place_spec = {
    .name = "trio_aiopoll._batch.Place",
    .basicsize = sizeof(struct place),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = place_slots,
};

/* ---- a batch ---- */

static PyObject *batch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"owner", "waiting", "max_receive", "max_send", NULL};
    PyObject *owner, *waiting;
    Py_ssize_t max_receive, max_send;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OO!nn:Batch", names, &owner, &PyDict_Type, &waiting, &max_receive, &max_send))
        return NULL;
    if (max_receive <= 0 || max_receive > PY_SSIZE_T_MAX / RECEIVES_IN_ARENA) {
        PyErr_Format(
            PyExc_ValueError,
            "max_receive must be from 1 to %zd (bytes), not %zd",
            PY_SSIZE_T_MAX / RECEIVES_IN_ARENA,
            max_receive);
        return NULL;
    }
    struct batch *self = (struct batch *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL)
        return NULL;
    self->owner = Py_NewRef(owner);
    self->waiting = Py_NewRef(waiting);
    self->max_receive = max_receive;
    self->max_send = max_send;
    self->fileno = PyUnicode_InternFromString("fileno");
    self->arena = PyMem_Malloc((size_t)max_receive * RECEIVES_IN_ARENA);
    if (self->fileno == NULL || self->arena == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int batch_traverse(struct batch *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->owner);
    Py_VISIT(self->waiting);
    for (int direction = 0; direction < 2; direction++)
        for (Py_ssize_t i = 0; i < self->queues[direction].count; i++)
            Py_VISIT(self->queues[direction].places[i]);
    return 0;
}

static int batch_clear(struct batch *self)
{
    queue_clear(&self->queues[RECEIVE]);
    queue_clear(&self->queues[SEND]);
    Py_CLEAR(self->owner);
    return 0;
}

static void batch_dealloc(struct batch *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    batch_clear(self);
    Py_XDECREF(self->waiting);
    Py_XDECREF(self->fileno);
    PyMem_Free(self->arena);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int batch_bool(const struct batch *self)
{
    return self->queues[RECEIVE].count != 0 || self->queues[SEND].count != 0;
}

static PyObject *batch_place(struct batch *self, PyObject *args)
{
    PyObject *keys[2];
    PyTypeObject **type = PyType_GetModuleState(Py_TYPE(self));
    if (type == NULL || !PyArg_ParseTuple(args, "OO:place", &keys[RECEIVE], &keys[SEND]))
        return NULL;
    if (!Py_IS_TYPE(keys[RECEIVE], &PyLong_Type) || !Py_IS_TYPE(keys[SEND], &PyLong_Type)) {
        PyErr_SetString(PyExc_TypeError, "a place's keys must be ints");
        return NULL;
    }
    struct place *place = (struct place *)((allocfunc)PyType_GetSlot(*type, Py_tp_alloc))(*type, 0);
    if (place == NULL)
        return NULL;
    place->batch = (struct batch *)Py_NewRef((PyObject *)self);
    place->keys[RECEIVE] = Py_NewRef(keys[RECEIVE]);
    place->keys[SEND] = Py_NewRef(keys[SEND]);
    return (PyObject *)place;
}

static PyObject *batch_open(struct batch *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "open takes two arguments: to receives, to sends");
        return NULL;
    }
    for (int direction = 0; direction < 2; direction++) {
        int is_open = PyObject_IsTrue(args[direction]);
        if (is_open < 0)
            return NULL;
        self->is_open[direction] = is_open;
    }
    Py_RETURN_NONE;
}

static PyObject *batch_lone_receive(struct batch *self, PyObject *unused)
{
    (void)unused;
    if (self->queues[RECEIVE].count != 1 || self->queues[SEND].count != 0)
        Py_RETURN_NONE;
    return Py_NewRef((PyObject *)self->queues[RECEIVE].places[0]);
}

/* What perform() returns; three lists. While it is made, nothing is allocated that could set off the garbage collector, as
 * finalizers might come back here. */
struct outcome {
    PyObject *tasks;
    PyObject *values;
    PyObject *blocked;
    Py_ssize_t failures;
};

static int append(PyObject *list, PyObject *item)
{
    int failed = item == NULL ? -1 : PyList_Append(list, item);
    Py_XDECREF(item);
    return failed;
}

/* Ends an operation with `value`, which it takes over and which may be NULL, with an exception set. */
static int settle(struct outcome *outcome, struct place *place, int direction, PyObject *value)
{
    int failed = append(outcome->values, value);
    return append(outcome->tasks, take_task(place, direction)) < 0 ? -1 : failed;
}

/* Ends an operation by having its task wait. It goes from the one table to the other in one step, so that there is no
 * moment in which nobody would find it. */
static int settle_blocked(struct batch *self, struct outcome *outcome, struct place *place, int direction)
{
    PyObject *key = place->keys[direction];
    PyObject *task = take_task(place, direction);
    PyObject *other = PyDict_GetItemWithError(self->waiting, key);
    int failed = other == NULL && PyErr_Occurred() != NULL;
    failed = failed || PyList_Append(outcome->blocked, key) < 0
        || PyList_Append(outcome->blocked, other == NULL ? Py_None : other) < 0
        || PyDict_SetItem(self->waiting, key, task) < 0;
    Py_DECREF(task);
    return failed ? -1 : 0;
}

/* The socket's descriptor. What has none, above all a socket that was closed, gets -1, and the kernel's word for that. */
static int read_fd(PyObject *socket, PyObject *fileno)
{
    PyObject *object = PyObject_CallMethodObjArgs(socket, fileno, NULL);
    long fd = object == NULL ? -1 : PyLong_AsLong(object);
    Py_XDECREF(object);
    if (fd == -1 && PyErr_Occurred())
        PyErr_WriteUnraisable(socket); /* it is no socket's, and no reason for the others to fail */
    return fd < 0 || fd > INT_MAX ? -1 : (int)fd;
}

/* Performs the first operations, AT_ONCE at most. Returns of how many it has told the outcome, which with an exception may
 * be fewer than have been performed. */
static Py_ssize_t perform_some(
    struct batch *self, int direction, struct place **places, Py_ssize_t count, struct outcome *outcome)
{
    int64_t fds[AT_ONCE], sizes[AT_ONCE], results[AT_ONCE];
    const char *data[AT_ONCE];
    Py_ssize_t done = 0;
    if (count > AT_ONCE)
        count = AT_ONCE;
    for (Py_ssize_t i = 0; i < count; i++) {
        fds[i] = read_fd(places[i]->sockets[direction], self->fileno);
        if (direction == SEND) {
            data[i] = PyBytes_AsString(places[i]->data);
            sizes[i] = PyBytes_Size(places[i]->data);
        }
    }
    Py_BEGIN_ALLOW_THREADS
    if (direction == SEND)
        transfer_send(fds, sizes, count, data, results);
    else
        count = transfer_receive(
            fds, count, self->max_receive, self->arena, self->max_receive * RECEIVES_IN_ARENA, results);
    Py_END_ALLOW_THREADS
    const char *received = self->arena;
    while (done < count) {
        struct place *place = places[done];
        int64_t result = results[done++];
        int failed;
        if (result == -EAGAIN) {
            failed = settle_blocked(self, outcome, place, direction);
        } else if (result < 0 || direction == SEND) {
            outcome->failures += result < 0;
            failed = settle(outcome, place, direction, PyLong_FromLongLong(result));
        } else {
            failed = settle(outcome, place, direction, PyBytes_FromStringAndSize(received, (Py_ssize_t)result));
            received += result;
        }
        if (failed < 0)
            break;
    }
    return done;
}

static int perform_all(struct batch *self, int direction, struct outcome *outcome)
{
    /* While it is in our hands, the garbage collector does not look into it. */
    struct queue queue = self->queues[direction];
    self->queues[direction] = (struct queue){0};
    Py_ssize_t done = 0;
    while (done < queue.count && !PyErr_Occurred())
        done += perform_some(self, direction, queue.places + done, queue.count - done, outcome);
    for (Py_ssize_t i = 0; i < queue.count; i++) {
        if (i >= done)
            Py_XDECREF(take_task(queue.places[i], direction));
        Py_DECREF(queue.places[i]);
    }
    queue.count = 0;
    self->queues[direction] = queue; /* nothing has come meanwhile: see may_begin() */
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *batch_perform(struct batch *self, PyObject *unused)
{
    (void)unused;
    if (self->is_performing) {
        PyErr_SetString(PyExc_RuntimeError, "the batch is being performed");
        return NULL;
    }
    int first = self->order == RECEIVES_FIRST ? RECEIVE : SEND;
    self->order = NO_ORDER;
    struct outcome outcome = {.tasks = PyList_New(0), .values = PyList_New(0), .blocked = PyList_New(0)};
    self->is_performing = 1;
    int failed = outcome.tasks == NULL || outcome.values == NULL || outcome.blocked == NULL
        || perform_all(self, first, &outcome) < 0 || perform_all(self, !first, &outcome) < 0;
    self->is_performing = 0;
    if (failed) {
        Py_XDECREF(outcome.tasks);
        Py_XDECREF(outcome.values);
        Py_XDECREF(outcome.blocked);
        return NULL;
    }
    return Py_BuildValue("(NNnN)", outcome.tasks, outcome.values, outcome.failures, outcome.blocked);
}

PyDoc_STRVAR(make_place_doc, "place(receive_key, send_key, /)\n--\n\n\
A new place. The keys are those of the polls that would follow.");
PyDoc_STRVAR(open_doc, "open(to_receives, to_sends, /)\n--\n\n\
From now on let them begin, or not. In the beginning it is open to none.");
PyDoc_STRVAR(lone_receive_doc, "lone_receive()\n--\n\nThe place of the only operation if that is a receive, or None.");
PyDoc_STRVAR(perform_doc, "perform()\n--\n\n\
Try each operation once, without blocking: sends before receives, unless a socket came to have a send after a receive.\n\n\
Returns (tasks, values, failures, blocked): for each task the bytes that have come, or how many have gone, or a negative\n\
errno, and how many of the last there are. The tasks of those that would block are waiting now; blocked has their keys,\n\
each followed by the task that had come to wait there meanwhile and does so no more, or by None. All these operations are\n\
over then.");

static PyMethodDef batch_methods[] = {
    {"place", (PyCFunction)batch_place, METH_VARARGS, make_place_doc},
    {"open", (PyCFunction)(void (*)(void))batch_open, METH_FASTCALL, open_doc},
    {"lone_receive", (PyCFunction)batch_lone_receive, METH_NOARGS, lone_receive_doc},
    {"perform", (PyCFunction)batch_perform, METH_NOARGS, perform_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(batch_doc, "Batch(owner, waiting, max_receive, max_send)\n--\n\n\
The operations that are to be performed by one call; true if there are any.\n\n\
Each names its socket, not only the descriptor: whoever closes a socket behind our back may have its number pass to\n\
another one before the call, and that one's bytes are not ours. A closed socket knows that it is.\n\n\
owner: what an operation must name to be let in. waiting: {key: the task that waits for it}; for these nothing may begin.\n\
max_receive: how many bytes a receive asks for. max_send: the most bytes that a send may have. ValueError: max_receive is not positive.");

static PyType_Slot batch_slots[] = {
    {Py_tp_doc, (void *)batch_doc},
    {Py_tp_new, batch_new},
    {Py_tp_traverse, batch_traverse},
    {Py_tp_clear, batch_clear},
    {Py_tp_dealloc, batch_dealloc},
    {Py_nb_bool, batch_bool},
    {Py_tp_methods, batch_methods},
    {0, NULL},
};

static PyType_Spec batch_spec = {
    .name = "trio_aiopoll._batch.Batch",
    .basicsize = sizeof(struct batch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = batch_slots,
};

/* ---- the module, whose state is the type of a place ---- */

static int module_exec(PyObject *module)
{
    PyObject **place_type = PyModule_GetState(module);
    *place_type = PyType_FromModuleAndSpec(module, &place_spec, NULL);
    if (*place_type == NULL)
        return -1;
    PyObject *batch_type = PyType_FromModuleAndSpec(module, &batch_spec, NULL);
    if (batch_type == NULL)
        return -1;
    int failed = PyModule_AddObjectRef(module, "Batch", batch_type);
    Py_DECREF(batch_type);
    return failed < 0 ? -1 : PyModule_AddObjectRef(module, "Place", *place_type);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(*(PyObject **)PyModule_GetState(module));
    return 0;
}

static int module_clear(PyObject *module)
{
    Py_CLEAR(*(PyObject **)PyModule_GetState(module));
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* a batch belongs to the thread of its run */
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "trio_aiopoll._batch",
    .m_size = sizeof(PyObject *),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__batch(void)
{
    return PyModuleDef_Init(&module);
}
