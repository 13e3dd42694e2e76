/* The extension module _batch: what tasks have asked their sockets to receive and to send, and one call that does it all.
 *
 * _transfer.c meets the kernel, and this file Python. It is not made by cffi like the rest of the C core, because what
 * comes and goes here are objects: cffi would have Python code make integers and pointers of them, around each call and
 * for each operation. That, and the dictionaries in which the operations were kept, took 2 us of the 11 that an echo
 * between 16 connections took.
 *
 * Of Trio it knows nothing but what a batch is told when it is made: where to find who is running, and by which attribute
 * of a task to tell whether it sleeps. A task, and the trap that a task yields to its scheduler, are objects that come in
 * and go out again. A batch and its places belong to the one thread that has the run; while operations are performed,
 * others may have the GIL, but nothing of the batch. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <time.h>

#include "_transfer.h"

/* Each receive needs room for all that it may bring. Used from the front, so of most calls only a few pages. */
#define RECEIVES_IN_ARENA 8
#define AT_ONCE 256

/* With so many tasks about to run, a send waits for the tick, to be done with those of the others. */
#define CROWD 4
/* Sends that wait for the tick wait for all of its tasks. A tick is slow if it took so long (ns), all together and for each
 * of its tasks; sends are then done at once, for so many times as long, up to a second. Who is slow as a rule never has
 * them wait, and who was once, or was not let run, soon has again. */
#define SECOND 1000000000
#define SLOW_TICK 1000000
#define SLOW_STEP 50000
#define AFTER_SLOW_TICK 20

enum direction { RECEIVE, SEND };
enum order { NO_ORDER, SENDS_FIRST, RECEIVES_FIRST };

struct place;

/* An attribute of objects that as a rule are of one type. */
struct attribute {
    PyObject *name;
    PyTypeObject *type; /* the last one's; strong, as the next */
    PyObject *member; /* what that type has for it if it is a slot, to be asked without a search */
    descrgetfunc get;
};

struct queue {
    struct place **places; /* strong references */
    Py_ssize_t count;
    Py_ssize_t capacity;
};

struct batch {
    PyObject_HEAD
    PyObject *owner;
    PyObject *context;
    unsigned long thread; /* which uses that context */
    PyObject *waiting;
    PyObject *fileno;
    PyTypeObject *socket_type; /* strong; for its instances that is the function behind fileno */
    PyCFunction read_fileno;
    struct attribute is_done;
    PyObject *nbytes; /* an attribute's name, as the next */
    PyObject *c_contiguous;
    PyObject *runner_key;
    PyObject *task_key;
    Py_ssize_t max_receive;
    Py_ssize_t large_receive;
    Py_ssize_t max_send;
    Py_ssize_t max_copy;
    Py_ssize_t runnable;
    int64_t tick_began;
    int64_t send_at_once_until;
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
    int receives_large; /* at last */
    /* of the operations that are in the batch, or wait; no task: no operation */
    PyObject *tasks[2];
    int is_waiting[2];
    PyObject *sockets[2];
    PyObject *data;
    int is_copy; /* of what may have changed when the operation has to wait */
};

/* ---- attributes ---- */

static void attribute_forget(struct attribute *attribute)
{
    PyTypeObject *type = attribute->type;
    attribute->type = NULL;
    Py_CLEAR(attribute->member);
    Py_XDECREF(type);
}

/* A slot is a data descriptor, which nothing that an instance has can hide. What is put into its place in the type once
 * it is known is not seen. */
static void attribute_learn(struct attribute *attribute, PyTypeObject *type)
{
    PyObject *member = NULL;
    if (PyType_GetSlot(type, Py_tp_getattro) == (void *)PyObject_GenericGetAttr) {
        member = PyObject_GetAttr((PyObject *)type, attribute->name);
        if (member == NULL)
            PyErr_Clear(); /* only its instances have it */
        else if (!Py_IS_TYPE(member, &PyMemberDescr_Type))
            Py_CLEAR(member);
    }
    attribute_forget(attribute);
    attribute->type = (PyTypeObject *)Py_NewRef((PyObject *)type);
    attribute->member = member;
    attribute->get = member == NULL ? NULL : PyType_GetSlot(&PyMemberDescr_Type, Py_tp_descr_get);
}

static PyObject *attribute_of(struct attribute *attribute, PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    if (type != attribute->type)
        attribute_learn(attribute, type);
    if (attribute->member == NULL)
        return PyObject_GetAttr(object, attribute->name);
    return attribute->get(attribute->member, object, (PyObject *)type);
}

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
    self->is_waiting[direction] = 0;
    Py_CLEAR(self->sockets[direction]);
    if (direction == SEND)
        Py_CLEAR(self->data);
    leave_if_closed(self);
    return task;
}

static int is_queued(const struct place *self, int direction)
{
    return self->tasks[direction] != NULL && !self->is_waiting[direction];
}

static int can_begin(const struct place *self, int direction)
{
    return !self->is_closed && !self->batch->is_performing && self->tasks[direction] == NULL
        && self->traps[direction] != NULL;
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

/* The running task, if this is the owner's run; borrowed. NULL without an exception: it is not. */
static PyObject *running_task(const struct batch *batch)
{
    if (PyThread_get_thread_ident() != batch->thread
        || PyDict_GetItemWithError(batch->context, batch->runner_key) != batch->owner)
        return NULL;
    return PyDict_GetItemWithError(batch->context, batch->task_key);
}

/* Finds the function behind fileno, if that is a method of such sockets that is written in C. To call it is what a call of
 * the method comes to. */
static void learn_fileno(struct batch *self, PyObject *socket)
{
    PyTypeObject *type = Py_TYPE(socket);
    if (self->socket_type != NULL || !Py_IS_TYPE(self->fileno, &PyMethodDescr_Type))
        return;
    descrgetfunc get = PyType_GetSlot(&PyMethodDescr_Type, Py_tp_descr_get);
    PyObject *method = get(self->fileno, socket, (PyObject *)type);
    if (method == NULL) {
        PyErr_Clear(); /* it is no socket, as will be found when its descriptor is read */
    } else if (PyCFunction_Check(method) && PyCFunction_GetFlags(method) == METH_NOARGS && self->socket_type == NULL) {
        self->read_fileno = PyCFunction_GetFunction(method);
        self->socket_type = (PyTypeObject *)Py_NewRef((PyObject *)type);
    }
    Py_XDECREF(method);
}

/* Has an operation begin, or answers why not: False: it is to be done at once; None: the owner knows. */
static PyObject *begin_for(
    struct place *self,
    struct batch *batch,
    PyObject *task,
    int direction,
    int is_for_tick,
    PyObject *socket,
    PyObject *data,
    int is_copy)
{
    int is_waiting = PyDict_Contains(batch->waiting, self->keys[direction]);
    if (is_waiting < 0)
        return NULL;
    if (is_waiting || !can_begin(self, direction))
        Py_RETURN_NONE;
    if (!is_for_tick || !batch->is_open[direction]) {
        if (is_queued(self, !direction))
            Py_RETURN_NONE; /* which it must not overtake */
        Py_RETURN_FALSE;
    }
    learn_fileno(batch, socket); /* may set off the garbage collector, whose finalizers may do anything to the place */
    enum order order = batch->order;
    if (is_queued(self, !direction)) /* they are to be performed in the order in which they have come */
        order = direction == RECEIVE ? SENDS_FIRST : RECEIVES_FIRST;
    if (!can_begin(self, direction) || (batch->order != NO_ORDER && batch->order != order))
        Py_RETURN_NONE;
    if (queue_push(&batch->queues[direction], self) < 0)
        return NULL;
    batch->order = order;
    self->tasks[direction] = Py_NewRef(task);
    self->sockets[direction] = Py_NewRef(socket);
    if (direction == SEND) {
        self->data = Py_NewRef(data);
        self->is_copy = is_copy;
    }
    return Py_NewRef(self->traps[direction]);
}

static PyObject *begin(
    struct place *self, int direction, int is_for_tick, PyObject *socket, PyObject *data, int is_copy)
{
    if (!can_begin(self, direction))
        Py_RETURN_NONE;
    struct batch *batch = (struct batch *)Py_NewRef((PyObject *)self->batch);
    PyObject *task = Py_XNewRef(running_task(batch));
    PyObject *answer = NULL;
    if (task != NULL)
        answer = begin_for(self, batch, task, direction, is_for_tick, socket, data, is_copy);
    else if (!PyErr_Occurred())
        answer = Py_NewRef(Py_None);
    Py_XDECREF(task);
    Py_DECREF(batch);
    return answer;
}

static PyObject *place_begin_receive(struct place *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "begin_receive takes socket and size");
        return NULL;
    }
    if (!Py_IS_TYPE(args[1], &PyLong_Type))
        Py_RETURN_NONE;
    int overflow;
    long long size = PyLong_AsLongLongAndOverflow(args[1], &overflow);
    int is_for_tick = !self->is_closed && size == self->batch->max_receive && !self->receives_large;
    return begin(self, RECEIVE, is_for_tick, args[0], NULL, 0);
}

/* A copy of what a memoryview shows. NULL, with an exception or not: it is too much, or does not lie in one piece. */
static PyObject *copy(const struct batch *batch, PyObject *view)
{
    PyObject *nbytes = PyObject_GetAttr(view, batch->nbytes);
    Py_ssize_t size = nbytes == NULL ? -1 : PyLong_AsSsize_t(nbytes);
    Py_XDECREF(nbytes);
    if (size < 0 || size > batch->max_copy)
        return NULL;
    PyObject *is_contiguous = PyObject_GetAttr(view, batch->c_contiguous);
    Py_XDECREF(is_contiguous);
    return is_contiguous == Py_True ? PyBytes_FromObject(view) : NULL;
}

static PyObject *place_begin_send(struct place *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "begin_send takes socket and data");
        return NULL;
    }
    PyObject *data = args[1];
    if (self->is_closed)
        Py_RETURN_NONE;
    if (Py_IS_TYPE(data, &PyBytes_Type))
        return begin(self, SEND, PyBytes_Size(data) <= self->batch->max_send, args[0], data, 0);
    if (!Py_IS_TYPE(data, &PyMemoryView_Type))
        Py_RETURN_NONE;
    PyObject *copied = self->batch->is_open[SEND] ? copy(self->batch, data) : NULL;
    PyErr_Clear(); /* it has been released, say, as send() will say */
    PyObject *answer = begin(self, SEND, copied != NULL, args[0], copied, 1);
    Py_XDECREF(copied);
    return answer;
}

static PyObject *place_received(struct place *self, PyObject *argument)
{
    Py_ssize_t size = PyLong_AsSsize_t(argument);
    if (size == -1 && PyErr_Occurred())
        return NULL;
    self->receives_large = !self->is_closed && size > self->batch->large_receive;
    Py_RETURN_NONE;
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
    if (is_queued(self, direction)) {
        if (self->batch->is_performing) {
            PyErr_SetString(PyExc_RuntimeError, "the operation is being performed");
            return NULL;
        }
        queue_remove(&self->batch->queues[direction], self);
    }
    return take_task(self, direction);
}

static PyObject *place_has_begun(struct place *self, PyObject *argument)
{
    int direction = parse_direction(argument);
    return direction < 0 ? NULL : PyBool_FromLong(is_queued(self, direction));
}

/* Has an operation wait that is not in the batch any more. It goes from the one table to the other in one step, so that
 * there is no moment in which nobody would find it. What has a copy is over, and its task waits: it has what was copied. */
static int wait_for(struct place *self, int direction, PyObject *pending)
{
    PyObject *waiting = self->batch->waiting, *key = self->keys[direction];
    int is_over = direction == SEND && self->is_copy;
    int failed = PyList_Append(pending, key) < 0;
    failed = failed || PyDict_SetItem(waiting, key, is_over ? self->tasks[direction] : (PyObject *)self) < 0;
    if (failed || is_over)
        Py_XDECREF(take_task(self, direction));
    else
        self->is_waiting[direction] = 1;
    return failed ? -1 : 0;
}

static PyObject *place_wait(struct place *self, PyObject *args)
{
    PyObject *argument, *pending;
    if (!PyArg_ParseTuple(args, "OO!:wait", &argument, &PyList_Type, &pending))
        return NULL;
    int direction = parse_direction(argument);
    if (direction < 0)
        return NULL;
    if (self->is_closed || !is_queued(self, direction) || self->batch->is_performing)
        Py_RETURN_FALSE;
    int is_taken = PyDict_Contains(self->batch->waiting, self->keys[direction]);
    if (is_taken < 0)
        return NULL;
    if (is_taken)
        Py_RETURN_FALSE;
    Py_INCREF(self);
    queue_remove(&self->batch->queues[direction], self);
    int failed = wait_for(self, direction, pending);
    Py_DECREF(self);
    return failed < 0 ? NULL : PyBool_FromLong(1);
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
PyDoc_STRVAR(begin_receive_doc, "begin_receive(sock, size, /)\n--\n\n\
Have the next perform() receive for the running task, which yields the trap that is returned here.\n\n\
False: it is to be done at once, as receives are not let in, it is not for max_receive bytes, or the last one brought a\n\
lot. None: it has to be seen what to do. There is no task, or another run's; the direction has an operation already, or\n\
somebody waits for its key; there is one of the other direction that it would overtake; the place is closed; or size is\n\
not an int.");
PyDoc_STRVAR(begin_send_doc, "begin_send(sock, data, /)\n--\n\n\
The same for sending bytes, or what a memoryview shows now: until then it might change, or be released. False also if\n\
they are more than max_send, or max_copy, or the memoryview is not contiguous; None also if the data are anything else.");
PyDoc_STRVAR(received_doc, "received(size, /)\n--\n\nHow many bytes a receive has brought that was done at once.");
PyDoc_STRVAR(has_begun_doc, "has_begun(direction, /)\n--\n\nWhether an operation is in the batch.");
PyDoc_STRVAR(task_doc, "task(direction, /)\n--\n\nWhose operation is in the batch, or waits; or None.");
PyDoc_STRVAR(socket_doc, "socket(direction, /)\n--\n\nOn what that operation is, or None.");
PyDoc_STRVAR(wait_doc, "wait(direction, pending, /)\n--\n\n\
Have the operation wait as perform() would if it blocked, without being tried. False: it is not in the batch, somebody is\n\
waiting for its key, or the place is closed.");
PyDoc_STRVAR(withdraw_doc, "withdraw(direction, /)\n--\n\n\
End the operation, and return its task. If it waits, the caller has to take it out of what waits.\n\n\
RuntimeError: there is none, or it is being performed.");
PyDoc_STRVAR(close_doc, "close()\n--\n\nLet no operation begin any more. What has begun goes on.");

static PyMethodDef place_methods[] = {
    {"set_traps", (PyCFunction)place_set_traps, METH_VARARGS, set_traps_doc},
    {"begin_receive", (PyCFunction)(void (*)(void))place_begin_receive, METH_FASTCALL, begin_receive_doc},
    {"begin_send", (PyCFunction)(void (*)(void))place_begin_send, METH_FASTCALL, begin_send_doc},
    {"task", (PyCFunction)place_task, METH_O, task_doc},
    {"socket", (PyCFunction)place_socket, METH_O, socket_doc},
    {"received", (PyCFunction)place_received, METH_O, received_doc},
    {"has_begun", (PyCFunction)place_has_begun, METH_O, has_begun_doc},
    {"wait", (PyCFunction)place_wait, METH_VARARGS, wait_doc},
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
    static char *names[] = {
        "owner",
        "context",
        "waiting",
        "is_done",
        "fileno",
        "max_receive",
        "large_receive",
        "max_send",
        "max_copy",
        NULL};
    PyObject *owner, *context, *waiting, *is_done, *fileno;
    Py_ssize_t max_receive, large_receive, max_send, max_copy;
    if (!PyArg_ParseTupleAndKeywords(
            args,
            kwargs,
            "OO!O!UOnnnn:Batch",
            names,
            &owner,
            &PyDict_Type,
            &context,
            &PyDict_Type,
            &waiting,
            &is_done,
            &fileno,
            &max_receive,
            &large_receive,
            &max_send,
            &max_copy))
        return NULL;
    if (!PyCallable_Check(fileno)) {
        PyErr_Format(PyExc_TypeError, "fileno must be callable, not %R", fileno);
        return NULL;
    }
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
    self->context = Py_NewRef(context);
    self->thread = PyThread_get_thread_ident();
    self->waiting = Py_NewRef(waiting);
    self->is_done.name = Py_NewRef(is_done);
    self->max_receive = max_receive;
    self->large_receive = large_receive;
    self->max_send = max_send;
    self->max_copy = max_copy;
    self->fileno = Py_NewRef(fileno);
    self->nbytes = PyUnicode_InternFromString("nbytes");
    self->c_contiguous = PyUnicode_InternFromString("c_contiguous");
    self->runner_key = PyUnicode_InternFromString("runner");
    self->task_key = PyUnicode_InternFromString("task");
    self->arena = PyMem_Malloc((size_t)max_receive * RECEIVES_IN_ARENA);
    if (self->nbytes == NULL || self->c_contiguous == NULL || self->runner_key == NULL || self->task_key == NULL
        || self->arena == NULL) {
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
    Py_VISIT(self->context);
    Py_VISIT(self->waiting);
    Py_VISIT(self->fileno);
    Py_VISIT(self->socket_type);
    Py_VISIT(self->is_done.type);
    Py_VISIT(self->is_done.member);
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
    Py_XDECREF(self->context);
    Py_XDECREF(self->waiting);
    Py_XDECREF(self->nbytes);
    Py_XDECREF(self->c_contiguous);
    Py_XDECREF(self->runner_key);
    Py_XDECREF(self->task_key);
    Py_XDECREF(self->fileno);
    attribute_forget(&self->is_done);
    Py_XDECREF(self->is_done.name);
    Py_XDECREF((PyObject *)self->socket_type);
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
    int are_equal = PyObject_RichCompareBool(keys[RECEIVE], keys[SEND], Py_EQ);
    if (are_equal != 0) {
        if (are_equal > 0)
            PyErr_SetString(PyExc_ValueError, "a place's keys must not be equal");
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

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * SECOND + now.tv_nsec;
}

static PyObject *batch_begin_tick(struct batch *self, PyObject *argument)
{
    Py_ssize_t runnable = PyLong_AsSsize_t(argument);
    if (runnable == -1 && PyErr_Occurred())
        return NULL;
    self->runnable = runnable;
    self->tick_began = now_ns();
    self->is_open[RECEIVE] = runnable >= 0;
    self->is_open[SEND] = runnable >= CROWD && self->tick_began >= self->send_at_once_until;
    Py_RETURN_NONE;
}

static PyObject *batch_end_tick(struct batch *self, PyObject *unused)
{
    (void)unused;
    int64_t now = now_ns();
    int64_t took = now - self->tick_began;
    if (took > SLOW_TICK && took > SLOW_STEP * (int64_t)self->runnable)
        self->send_at_once_until = now + (took < SECOND / AFTER_SLOW_TICK ? AFTER_SLOW_TICK * took : SECOND);
    Py_RETURN_NONE;
}

static PyObject *batch_is_open(struct batch *self, PyObject *argument)
{
    int direction = parse_direction(argument);
    return direction < 0 ? NULL : PyBool_FromLong(self->is_open[direction]);
}

static PyObject *batch_lone_receive(struct batch *self, PyObject *unused)
{
    (void)unused;
    if (self->queues[RECEIVE].count != 1 || self->queues[SEND].count != 0)
        Py_RETURN_NONE;
    return Py_NewRef((PyObject *)self->queues[RECEIVE].places[0]);
}

enum list { TASKS, VALUES, LISTS };

/* What perform() returns. While it is made, nothing is allocated that could set off the garbage collector, and who comes
 * back here all the same, from the end of a task or a socket, is refused: see is_performing. */
struct outcome {
    PyObject *lists[LISTS];
    Py_ssize_t count; /* of what is in each */
    PyObject *ousted; /* borrowed, as the next */
    PyObject *pending;
    Py_ssize_t failures;
};

/* They get room for so many, and are seen by neither the garbage collector nor other threads before they are
 * closed. */
static int open_lists(struct outcome *outcome, Py_ssize_t capacity)
{
    int collects = PyGC_Disable();
    for (int i = 0; i < LISTS; i++) {
        outcome->lists[i] = PyList_New(capacity);
        if (outcome->lists[i] != NULL)
            PyObject_GC_UnTrack(outcome->lists[i]);
    }
    if (collects)
        PyGC_Enable();
    return PyErr_Occurred() ? -1 : 0;
}

static int close_lists(struct outcome *outcome)
{
    int failed = 0;
    for (int i = 0; i < LISTS; i++) {
        PyObject *list = outcome->lists[i];
        if (list == NULL)
            continue;
        PyObject_GC_Track(list);
        if (PyList_Size(list) != outcome->count)
            failed = PyList_SetSlice(list, outcome->count, PyList_Size(list), NULL) < 0 || failed;
    }
    return failed ? -1 : 0;
}

/* Ends an operation with `value`, which it takes over and which may be NULL, with an exception set. */
static int settle(struct outcome *outcome, struct place *place, int direction, PyObject *value)
{
    if (value == NULL) {
        Py_XDECREF(take_task(place, direction));
        return -1;
    }
    Py_ssize_t i = outcome->count++;
    PyList_SetItem(outcome->lists[VALUES], i, value);
    PyList_SetItem(outcome->lists[TASKS], i, take_task(place, direction));
    return 0;
}

static int append(PyObject *list, PyObject *item)
{
    int failed = item == NULL ? -1 : PyList_Append(list, item);
    Py_XDECREF(item);
    return failed;
}

static int is_place(const struct batch *self, PyObject *object)
{
    PyTypeObject **type = PyType_GetModuleState(Py_TYPE(self));
    return Py_IS_TYPE(object, *type);
}

/* Whose key it is, of the two. -1: an exception. */
static int direction_of(const struct place *place, PyObject *key)
{
    int is_send = PyObject_RichCompareBool(place->keys[SEND], key, Py_EQ);
    return is_send < 0 ? -1 : is_send ? SEND : RECEIVE;
}

/* Has whoever waits for the key wait no more, and tells so. -1: an exception. */
static int oust(struct batch *self, struct outcome *outcome, PyObject *key)
{
    PyObject *other = PyDict_GetItemWithError(self->waiting, key);
    if (other == NULL)
        return PyErr_Occurred() ? -1 : 0;
    if (is_place(self, other)) {
        struct place *place = (struct place *)Py_NewRef(other);
        int direction = direction_of(place, key);
        other = direction < 0 ? NULL : take_task(place, direction);
        Py_DECREF(place);
        if (other == NULL)
            return PyErr_Occurred() ? -1 : 0; /* it was withdrawn */
    } else {
        Py_INCREF(other);
    }
    if (append(outcome->ousted, Py_NewRef(key)) == 0)
        return append(outcome->ousted, other);
    Py_XDECREF(other);
    return -1;
}

static int settle_blocked(struct batch *self, struct outcome *outcome, struct place *place, int direction)
{
    if (oust(self, outcome, place->keys[direction]) == 0)
        return wait_for(place, direction, outcome->pending);
    Py_XDECREF(take_task(place, direction));
    return -1;
}

/* The socket's descriptor. What has none, above all a socket that was closed, gets -1, and the kernel's word for that. */
static int read_fd(struct batch *self, PyObject *socket)
{
    PyObject *object = Py_TYPE(socket) == self->socket_type ? self->read_fileno(socket, NULL)
                                                            : PyObject_CallFunctionObjArgs(self->fileno, socket, NULL);
    long fd = object == NULL ? -1 : PyLong_AsLong(object);
    Py_XDECREF(object);
    if (fd == -1 && PyErr_Occurred())
        PyErr_WriteUnraisable(socket); /* it is no socket's, and no reason for the others to fail */
    return fd < 0 || fd > INT_MAX ? -1 : (int)fd;
}

/* Whether the task sleeps; -1: an exception. */
static int is_asleep(struct batch *self, PyObject *task)
{
    Py_INCREF(task);
    PyObject *is_done = attribute_of(&self->is_done, task);
    Py_XDECREF(is_done);
    Py_DECREF(task);
    return is_done == NULL ? -1 : is_done == Py_None;
}

/* The operations of one direction while they are performed, AT_ONCE at most with each release of the GIL. */
struct share {
    int direction;
    struct queue queue; /* in our hands, where the garbage collector does not look into it */
    int is_begun;
    Py_ssize_t done; /* of these, and told */
    Py_ssize_t count; /* of the next, which are about to be */
    int64_t fds[AT_ONCE], sizes[AT_ONCE], results[AT_ONCE];
    const char *data[AT_ONCE];
};

static void take_share(struct batch *self, struct share *share, int direction)
{
    share->direction = direction;
    share->queue = self->queues[direction];
    share->is_begun = 0;
    share->done = share->count = 0;
    self->queues[direction] = (struct queue){0};
}

/* Ends the operations of those who go on already. They would have nobody to go to with what came of them. */
static int drop_awake(struct batch *self, struct share *share)
{
    struct queue *queue = &share->queue;
    Py_ssize_t kept = 0;
    int failed = 0;
    for (Py_ssize_t i = 0; i < queue->count; i++) {
        struct place *place = queue->places[i];
        int keep = failed ? 1 : is_asleep(self, place->tasks[share->direction]);
        failed = failed || keep < 0;
        if (keep != 0) {
            queue->places[kept++] = place;
        } else {
            Py_XDECREF(take_task(place, share->direction));
            Py_DECREF(place);
        }
    }
    queue->count = kept;
    share->is_begun = failed; /* so that it does not fail again in each tick */
    return failed ? -1 : 0;
}

/* Gives back what has not begun, and ends what has begun and has not been told: without an exception there is neither. */
static void end_share(struct batch *self, struct share *share)
{
    struct queue *queue = &share->queue;
    if (share->is_begun) {
        for (Py_ssize_t i = 0; i < queue->count; i++) {
            if (i >= share->done)
                Py_XDECREF(take_task(queue->places[i], share->direction));
            Py_DECREF(queue->places[i]);
        }
        queue->count = 0;
    }
    self->queues[share->direction] = *queue; /* nothing has come meanwhile: see can_begin() */
}

static void prepare(struct batch *self, struct share *share)
{
    share->is_begun = 1;
    struct place **places = share->queue.places + share->done;
    share->count = share->queue.count - share->done < AT_ONCE ? share->queue.count - share->done : AT_ONCE;
    for (Py_ssize_t i = 0; i < share->count; i++) {
        share->fds[i] = read_fd(self, places[i]->sockets[share->direction]);
        if (share->direction == SEND) {
            share->data[i] = PyBytes_AsString(places[i]->data);
            share->sizes[i] = PyBytes_Size(places[i]->data);
        }
    }
}

/* Whether nothing is left after what is about to be, or has been, performed. */
static int is_last(const struct share *share)
{
    return share->done + share->count == share->queue.count;
}

static void transfer(struct batch *self, struct share *share)
{
    if (share->direction == SEND)
        transfer_send(share->fds, share->sizes, share->count, share->data, share->results);
    else
        share->count = transfer_receive(
            share->fds,
            share->count,
            self->max_receive,
            self->arena,
            self->max_receive * RECEIVES_IN_ARENA,
            share->results);
}

static int tell(struct batch *self, struct share *share, struct outcome *outcome)
{
    const char *received = self->arena;
    int failed = 0;
    for (Py_ssize_t i = 0; i < share->count && !failed; i++) {
        struct place *place = share->queue.places[share->done++];
        int64_t result = share->results[i];
        if (result == -EAGAIN) {
            failed = settle_blocked(self, outcome, place, share->direction) < 0;
        } else if (result < 0 || share->direction == SEND) {
            outcome->failures += result < 0;
            failed = settle(outcome, place, share->direction, PyLong_FromLongLong(result)) < 0;
        } else {
            PyObject *data = PyBytes_FromStringAndSize(received, (Py_ssize_t)result);
            received += result;
            place->receives_large = result > self->large_receive;
            failed = settle(outcome, place, share->direction, data) < 0;
        }
    }
    return failed ? -1 : 0;
}

/* Performs some of each, without the GIL: of the second only after the last of the first. */
static int perform_some(struct batch *self, struct share shares[2], struct outcome *outcome)
{
    prepare(self, &shares[0]);
    shares[1].count = 0;
    if (is_last(&shares[0]))
        prepare(self, &shares[1]);
    Py_BEGIN_ALLOW_THREADS
    transfer(self, &shares[0]);
    if (is_last(&shares[0]))
        transfer(self, &shares[1]);
    else
        shares[1].count = 0; /* there was no room for all of the first */
    Py_END_ALLOW_THREADS
    return tell(self, &shares[0], outcome) < 0 ? -1 : tell(self, &shares[1], outcome);
}

static int perform_all(struct batch *self, int first, struct outcome *outcome)
{
    struct share shares[2];
    int failed = open_lists(outcome, self->queues[RECEIVE].count + self->queues[SEND].count) < 0;
    take_share(self, &shares[0], first);
    take_share(self, &shares[1], !first);
    if (!failed)
        self->order = NO_ORDER;
    /* This may run code, by which sockets may be closed and their numbers pass to others. From when these are read until
     * all is done, nothing does, but a fileno() that is no method of a socket's. */
    failed = failed || drop_awake(self, &shares[0]) < 0 || drop_awake(self, &shares[1]) < 0;
    while (!failed && (shares[0].done < shares[0].queue.count || shares[1].done < shares[1].queue.count))
        failed = perform_some(self, shares, outcome) < 0;
    end_share(self, &shares[0]);
    end_share(self, &shares[1]);
    return failed ? -1 : 0;
}

static PyObject *batch_perform(struct batch *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "perform takes pending and ousted");
        return NULL;
    }
    if (!PyList_Check(args[0]) || !PyList_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "pending and ousted must be lists");
        return NULL;
    }
    if (self->is_performing) {
        PyErr_SetString(PyExc_RuntimeError, "the batch is being performed");
        return NULL;
    }
    int first = self->order == RECEIVES_FIRST ? RECEIVE : SEND;
    struct outcome outcome = {.pending = args[0], .ousted = args[1]};
    self->is_performing = 1;
    int failed = perform_all(self, first, &outcome) < 0;
    self->is_performing = 0;
    failed = close_lists(&outcome) < 0 || failed;
    PyObject **lists = outcome.lists;
    /* Py_BuildValue() would take three times as long */
    PyObject *failures = failed ? NULL : PyLong_FromSsize_t(outcome.failures);
    PyObject *told = failures == NULL
        ? NULL
        : PyTuple_Pack(3, lists[TASKS], lists[VALUES], failures);
    for (int i = 0; i < LISTS; i++)
        Py_XDECREF(lists[i]);
    Py_XDECREF(failures);
    return told;
}

/* Ends the wait of an operation and puts it into the batch, unless its task goes on already. -1: an exception. */
static int resume_one(struct batch *self, struct place *place, PyObject *key)
{
    int direction = direction_of(place, key);
    if (direction < 0 || PyDict_DelItem(self->waiting, key) < 0)
        return -1;
    if (!place->is_waiting[direction])
        return 0; /* withdrawn */
    PyObject *task = place->tasks[direction];
    int resumes = is_asleep(self, task);
    if (place->tasks[direction] != task || !place->is_waiting[direction])
        return PyErr_Occurred() ? -1 : 0; /* withdrawn meanwhile */
    if (resumes > 0 && queue_push(&self->queues[direction], place) == 0)
        place->is_waiting[direction] = 0;
    else
        Py_XDECREF(take_task(place, direction));
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *batch_resume(struct batch *self, PyObject *argument)
{
    if (self->is_performing) {
        PyErr_SetString(PyExc_RuntimeError, "the batch is being performed");
        return NULL;
    }
    PyObject *keys = PySequence_List(argument);
    PyObject *others = keys == NULL ? NULL : PyList_New(0);
    int failed = others == NULL;
    for (Py_ssize_t i = 0; !failed && i < PyList_Size(keys); i++) {
        PyObject *key = PyList_GetItem(keys, i);
        PyObject *waiter = PyDict_GetItemWithError(self->waiting, key);
        if (waiter != NULL && is_place(self, waiter)) {
            Py_INCREF(waiter);
            failed = resume_one(self, (struct place *)waiter, key) < 0;
            Py_DECREF(waiter);
        } else {
            failed = PyErr_Occurred() != NULL || PyList_Append(others, key) < 0;
        }
    }
    Py_XDECREF(keys);
    if (failed)
        Py_CLEAR(others);
    return others;
}

PyDoc_STRVAR(make_place_doc, "place(receive_key, send_key, /)\n--\n\n\
A new place. The keys are those of the polls that would follow.");
PyDoc_STRVAR(begin_tick_doc, "begin_tick(runnable, /)\n--\n\n\
So many tasks are about to run. From now on receives are let in unless that is negative, and sends if there is a crowd\n\
of them and no tick has been slow of late. In the beginning none are.");
PyDoc_STRVAR(end_tick_doc, "end_tick()\n--\n\nThey have run. To be called at once, so that the time tells how long it took.");
PyDoc_STRVAR(is_open_doc, "is_open(direction, /)\n--\n\nWhether operations of this direction are let in.");
PyDoc_STRVAR(lone_receive_doc, "lone_receive()\n--\n\nThe place of the only operation if that is a receive, or None.");
PyDoc_STRVAR(perform_doc, "perform(pending, ousted, /)\n--\n\n\
Try each operation once, without blocking: sends before receives, unless a socket came to have a send after a receive.\n\n\
Returns (tasks, values, failures). The operations of these tasks are over: for each the bytes that have come, or\n\
how many have gone, or a negative errno, and how many of the last there are. An operation that would block waits now: its\n\
place is what waits for its key, or its task if it was to send what a memoryview shows, and the key is appended to\n\
pending. The operations of tasks that go on already are over and have not been tried. To ousted are appended the keys for\n\
which another task had come to wait meanwhile, which does so no more, each followed by that task. Both lists have them\n\
before anybody else can run.");
PyDoc_STRVAR(resume_doc, "resume(keys, /)\n--\n\n\
Put the operations that wait for these keys into the batch again. Those whose task goes on already are over.\n\n\
Returns the keys for which no operation waits.");

static PyMethodDef batch_methods[] = {
    {"place", (PyCFunction)batch_place, METH_VARARGS, make_place_doc},
    {"begin_tick", (PyCFunction)batch_begin_tick, METH_O, begin_tick_doc},
    {"end_tick", (PyCFunction)batch_end_tick, METH_NOARGS, end_tick_doc},
    {"is_open", (PyCFunction)batch_is_open, METH_O, is_open_doc},
    {"lone_receive", (PyCFunction)batch_lone_receive, METH_NOARGS, lone_receive_doc},
    {"perform", (PyCFunction)(void (*)(void))batch_perform, METH_FASTCALL, perform_doc},
    {"resume", (PyCFunction)batch_resume, METH_O, resume_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(batch_doc, "Batch(owner, context, waiting, is_done, fileno, max_receive, large_receive, max_send, max_copy)\n--\n\n\
The operations that are to be performed by one call; true if there are any.\n\n\
Each names its socket, not only the descriptor: whoever closes a socket behind our back may have its number pass to\n\
another one before the call, and that one's bytes are not ours. A closed socket knows that it is.\n\n\
owner: the run. context: {'runner': whose run it is, 'task': who is running, if anybody is}, of this thread. waiting: {key:\n\
the task that waits for it, or the place whose operation does}; for these nothing may begin. is_done: the name of a task's\n\
attribute that is None for as long as the task sleeps. fileno: what tells the descriptor of a socket, as its method would.\n\
max_receive: how many bytes a receive asks for. large_receive: after one that brought more, the place's next one is not\n\
let in. max_send: the most bytes that a send may have. max_copy: the most that one may have that is not given as bytes.\n\n\
TypeError, ValueError: fileno cannot be called; max_receive is not positive, or too large.");

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
