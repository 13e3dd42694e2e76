/* Each system call made to fail in each way it can: no key is lost or reported twice, nothing hangs or spins, and after a
 * cancel that succeeded no file is held. */
#define _GNU_SOURCE
#include "harness.h"

#include <limits.h>
#include <sys/eventfd.h>

#include "_ring.h"

#define LENGTH(array) (sizeof(array) / sizeof(*(array)))
#define BATCH 5

static int error_to_give;
static long call_to_fail;
static unsigned long times_to_fail; /* counted down */

static bool fail_the_call(long number, const long *args, long *result)
{
    (void)args;
    if (number != call_to_fail || times_to_fail == 0)
        return false;
    times_to_fail--;
    *result = -error_to_give;
    return true;
}

static void fail(long number, int error, unsigned long times)
{
    call_to_fail = number;
    error_to_give = error;
    times_to_fail = times;
    forget_calls();
    intercept(fail_the_call);
}

static void make_keys(const struct pair *pairs, int64_t *keys, size_t count)
{
    for (size_t i = 0; i < count; i++)
        keys[i] = reading(pairs[i].ours);
}

static void check_let_go(struct pair *pairs, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        close(pairs[i].ours);
        CHECK(sees_eof(pairs[i].peer));
        close(pairs[i].peer);
    }
    free(pairs);
}

/* ---- io_setup ---- */

TEST(setup_that_fails_gives_its_errno)
{
    static const int errors[] = {EAGAIN, ENOMEM, ENOSYS, EPERM, EACCES, EINVAL, EFAULT};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        int error = 0;
        fail(SYS_io_setup, errors[i], 1);
        CHECK(polls_open(-1, &error) == NULL);
        CHECK_EQ(error, -errors[i]);
        CHECK_EQ(calls_of(SYS_io_setup), 1);
        CHECK_EQ(calls_of(SYS_io_destroy), 0);
        polls_free(open_polls()); /* not for good */
        while (pool_idle_count() > 0)
            CHECK_EQ(pool_destroy(pool_get(&error)), 0);
    }
}

/* struct aio_ring of the kernel */
struct fake_ring {
    uint32_t id;
    uint32_t nr;
    _Atomic uint32_t head;
    _Atomic uint32_t tail;
    uint32_t magic;
    uint32_t compat_features;
    uint32_t incompat_features;
    uint32_t header_length;
    struct ring_event events[64];
};

static struct fake_ring fake;
static struct fake_ring *given = &fake;

static void reset_fake(void)
{
    memset(&fake, 0, sizeof(fake));
    fake.nr = LENGTH(fake.events);
    fake.magic = 0xa10a10a1U;
    fake.compat_features = 1;
    fake.header_length = 32;
    given = &fake;
}

static bool give_fake_ring(long number, const long *args, long *result)
{
    if (number == SYS_io_setup)
        *(unsigned long *)args[1] = (unsigned long)given;
    *result = 0;
    return number == SYS_io_setup || number == SYS_io_destroy;
}

TEST(rings_of_an_unknown_kind_are_left_alone)
{
    for (int kind = 0; kind < 6; kind++) {
        int error = 0;
        reset_fake();
        if (kind == 0)
            fake.magic ^= 1;
        else if (kind == 1)
            fake.incompat_features = 1;
        else if (kind == 2)
            fake.header_length = 64;
        else if (kind < 5)
            fake.nr = (uint32_t)kind - 3;
        else
            given = NULL; /* a filter that answers 0 in the kernel's place */
        forget_calls();
        intercept(give_fake_ring);
        CHECK(polls_open(-1, &error) == NULL);
        CHECK_EQ(error, -EPROTO);
        CHECK_EQ(calls_of(SYS_io_destroy), given == NULL ? 0 : 1);
    }
}

TEST(a_spent_budget_refuses_what_does_not_fit_and_is_asked_again)
{
    static const int errors[] = {EAGAIN, ENOMEM, ENOSYS, EPERM, EINVAL, EFAULT};
    enum { WANTED = 1200 };
    struct pair *pairs = make_pairs(WANTED);
    int64_t keys[WANTED];
    make_keys(pairs, keys, WANTED);
    for (size_t i = 0; i < LENGTH(errors); i++) {
        struct polls *polls = open_polls();
        uint64_t room = statistics_of(polls).capacity;
        size_t refusals_before = refusals();
        fail(SYS_io_setup, errors[i], 1);
        CHECK_EQ(tick(polls, keys, WANTED, 0), WANTED - room);
        CHECK_EQ(refusals() - refusals_before, WANTED - room);
        for (size_t at = 0; at < WANTED; at++)
            CHECK(is_awaited(keys[at]) || refusal_of(keys[at]) == EAGAIN);
        CHECK_EQ(calls_of(SYS_io_setup), 1);
        CHECK(calls_of(SYS_io_submit) <= 3);
        /* not asked for each wait */
        for (size_t at = WANTED - 100; at < WANTED; at++)
            CHECK_EQ(tick_one(polls, keys[at], 0), 1);
        CHECK_EQ(calls_of(SYS_io_setup), 1);
        CHECK(calls_of(SYS_io_submit) <= 3);
        /* room in the first ring is used */
        make_ready(pairs[0]);
        tick_until(polls, 1);
        CHECK_EQ(tick_one(polls, keys[WANTED - 1], 0), 0);
        /* but it is asked again */
        advance_clock(2 * SECOND_NS);
        CHECK_EQ(tick_one(polls, keys[WANTED - 2], 0), 0);
        CHECK_EQ(statistics_of(polls).rings, 2);
        drain(pairs[0]);
        for (size_t at = 0; at < WANTED; at++)
            cancel_one(polls, keys[at]);
        CHECK_EQ(awaited(), 0);
        polls_free(polls);
        intercept(NULL);
        int error;
        while (pool_idle_count() > 0)
            CHECK_EQ(pool_destroy(pool_get(&error)), 0);
    }
    free_pairs(pairs, WANTED);
}

TEST(own_fd_has_no_slot_to_fear_for)
{
    enum { WANTED = 1200 };
    struct pair *pairs = make_pairs(WANTED);
    int64_t keys[WANTED];
    int error = 0;
    uint64_t one = 1;
    int own = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    struct polls *polls = polls_open(own, &error);
    CHECK(polls != NULL);
    make_keys(pairs, keys, WANTED);
    fail(SYS_io_setup, EAGAIN, ULONG_MAX);
    CHECK(tick(polls, keys, WANTED, 0) > 0);
    uint64_t full = statistics_of(polls).in_flight;
    CHECK_EQ(full, statistics_of(polls).capacity);

    /* it is not refused, and what waits for it neither spins nor is late */
    CHECK_EQ(tick_one(polls, reading(own), 0), 0);
    CHECK(is_awaited(reading(own)));
    forget_calls();
    CHECK_EQ(tick(polls, NULL, 0, SECOND_NS / 5), 0);
    CHECK(calls_of(SYS_io_getevents) > 10 && calls_of(SYS_io_getevents) <= 250);
    CHECK(calls_of(SYS_io_submit) <= 5);
    for (int timeout = 0; timeout < 2; timeout++) {
        CHECK(write(own, &one, sizeof(one)) == sizeof(one));
        CHECK_EQ(tick(polls, NULL, 0, timeout * LONG_NS), 1);
        CHECK(!is_awaited(reading(own)));
        CHECK(read(own, &one, sizeof(one)) == sizeof(one));
        CHECK_EQ(tick_one(polls, reading(own), 0), 0);
    }

    CHECK_EQ(cancel_one(polls, reading(own)), 0);
    CHECK(write(own, &one, sizeof(one)) == sizeof(one));
    CHECK_EQ(tick(polls, NULL, 0, 0), 0);
    CHECK(read(own, &one, sizeof(one)) == sizeof(one));
    CHECK_EQ(tick_one(polls, reading(own), 0), 0);

    /* and it gets the first slot there is */
    make_ready(pairs[0]);
    CHECK_EQ(tick(polls, NULL, 0, LONG_NS), 1);
    CHECK_EQ(tick(polls, NULL, 0, 0), 0);
    CHECK_EQ(statistics_of(polls).in_flight, full);
    forget_calls();
    CHECK_EQ(tick(polls, NULL, 0, SECOND_NS / 5), 0);
    CHECK(calls_of(SYS_io_getevents) < 15);
    CHECK(write(own, &one, sizeof(one)) == sizeof(one));
    CHECK_EQ(tick(polls, NULL, 0, LONG_NS), 1);
    CHECK(!is_awaited(reading(own)));
    intercept(NULL);
    polls_free(polls);
    close(own);
    free_pairs(pairs, WANTED);
}

/* ---- io_submit ---- */

static int bad_fd;       /* the request that the kernel does not like */
static long bad_for_now; /* how often it is refused */

/* As the kernel does it: what comes first is taken, and the error shows in the next call. */
static bool dislike_a_request(long number, const long *args, long *result)
{
    if (number != SYS_io_submit || bad_for_now == 0)
        return false;
    struct ring_iocb **iocbs = (struct ring_iocb **)args[2];
    long count = 0;
    while (count < args[1] && iocbs[count]->fildes != (uint32_t)bad_fd)
        count++;
    if (count == args[1])
        return false;
    long shorter[5] = {args[0], count, args[2], 0, 0};
    if (count == 0) {
        bad_for_now--;
        *result = -error_to_give;
    } else {
        *result = forward(SYS_io_submit, shorter);
    }
    return true;
}

static void dislike(int fd, int error, long times)
{
    bad_fd = fd;
    error_to_give = error;
    bad_for_now = times;
    forget_calls();
    intercept(dislike_a_request);
}

TEST(submit_that_refuses_one_request_refuses_no_other)
{
    static const int errors[] = {EBADF, EINVAL, EFAULT, ENOMEM, EOPNOTSUPP, EIO};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        for (size_t index = 0; index < BATCH; index++) {
            struct polls *polls = open_polls();
            struct pair *pairs = make_pairs(BATCH);
            int64_t keys[BATCH];
            make_keys(pairs, keys, BATCH);
            dislike(pairs[index].ours, errors[i], 1);
            CHECK_EQ(tick(polls, keys, BATCH, 0), 1);
            CHECK(calls_of(SYS_io_submit) <= 3);
            CHECK_EQ(refusal_of(keys[index]), errors[i]);
            CHECK_EQ(statistics_of(polls).in_flight, BATCH - 1);
            /* next time it may be welcome */
            CHECK_EQ(tick_one(polls, keys[index], 0), 0);
            finish(polls, pairs, BATCH);
            check_let_go(pairs, BATCH);
            polls_free(polls);
        }
    }
}

TEST(submit_that_refuses_every_request_refuses_each_once)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(BATCH);
    int64_t keys[BATCH];
    make_keys(pairs, keys, BATCH);
    fail(SYS_io_submit, EINVAL, 100);
    CHECK_EQ(tick(polls, keys, BATCH, 0), BATCH);
    CHECK_EQ(calls_of(SYS_io_submit), BATCH);
    for (int i = 0; i < BATCH; i++)
        CHECK_EQ(refusal_of(keys[i]), EINVAL);
    intercept(NULL);
    CHECK_EQ(tick(polls, keys, BATCH, 0), 0);
    finish(polls, pairs, BATCH);
    check_let_go(pairs, BATCH);
    polls_free(polls);
}

/* EAGAIN, or 0, which means as much. `times`: for how many calls. */
static void submit_again(int error, size_t index, long times)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(BATCH);
    int64_t keys[BATCH];
    make_keys(pairs, keys, BATCH);
    dislike(pairs[index].ours, error, times);
    long result = tick(polls, keys, BATCH, 0);
    CHECK(calls_of(SYS_io_submit) <= 8); /* another ring is tried, and its doorbell takes a call too */
    CHECK(calls_of(SYS_io_setup) <= 1);
    size_t gone = 0;
    for (size_t i = 0; i < BATCH; i++) {
        if (is_awaited(keys[i]))
            continue;
        gone++;
        CHECK(i >= index);
        CHECK_EQ(refusal_of(keys[i]), EAGAIN);
    }
    CHECK_EQ(result, gone);
    CHECK_EQ(statistics_of(polls).in_flight, BATCH - gone);
    if (times > 1000)
        CHECK(gone > 0);
    /* without a system call each, while it lasts */
    unsigned long before = calls_of(SYS_io_submit);
    if (gone > 0) {
        for (int i = 0; i < 50; i++)
            CHECK_EQ(tick_one(polls, keys[index], 0), 1);
        CHECK(calls_of(SYS_io_submit) - before <= 2);
    }
    /* and never for good */
    intercept(NULL);
    advance_clock(2 * SECOND_NS);
    for (size_t i = 0; i < BATCH; i++)
        if (!is_awaited(keys[i]))
            CHECK_EQ(tick_one(polls, keys[i], 0), 0);
    finish(polls, pairs, BATCH);
    polls_free(polls);
    check_let_go(pairs, BATCH);
}

TEST(submit_that_says_again_is_neither_asked_for_ever_nor_never)
{
    static const int errors[] = {EAGAIN, 0};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        for (size_t index = 0; index < BATCH; index++) {
            submit_again(errors[i], index, 1);
            submit_again(errors[i], index, 2);
            submit_again(errors[i], index, 1000000);
        }
    }
}

TEST(submit_that_stops_working_is_fatal_and_holds_no_file)
{
    static const int errors[] = {ENOSYS, EPERM, EACCES};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        for (size_t index = 0; index < BATCH; index++) {
            struct polls *polls = open_polls();
            struct pair *pairs = make_pairs(BATCH);
            int64_t keys[BATCH];
            make_keys(pairs, keys, BATCH);
            dislike(pairs[index].ours, errors[i], 1000000);
            CHECK_EQ(tick(polls, keys, BATCH, LONG_NS), -errors[i]);
            CHECK(calls_of(SYS_io_submit) <= 2);
            CHECK_EQ(calls_of(SYS_io_getevents), 0);
            CHECK_EQ(polls_destroy(polls), 0);
            book_closed();
            CHECK_EQ(tick(polls, NULL, 0, LONG_NS), -ESHUTDOWN);
            check_let_go(pairs, BATCH);
            polls_free(polls);
        }
    }
}

static long room; /* in the first ring, less than there are slots: the kernel keeps some for other CPUs */
static long in_first_ring;
static long first_context;

static bool keep_room_short(long number, const long *args, long *result)
{
    if (number != SYS_io_submit)
        return false;
    if (first_context == 0)
        first_context = args[0];
    if (args[0] != first_context)
        return false;
    long count = args[1] < room - in_first_ring ? args[1] : room - in_first_ring;
    long shorter[5] = {args[0], count, args[2], 0, 0};
    *result = count == 0 ? -EAGAIN : forward(SYS_io_submit, shorter);
    if (*result > 0)
        in_first_ring += *result;
    return true;
}

/* The kernel promises half of the slots only. */
TEST(rings_grow_also_when_the_first_holds_less_than_hoped)
{
    enum { WANTED = 1200 };
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(WANTED);
    int64_t keys[WANTED];
    make_keys(pairs, keys, WANTED);
    room = 400;
    intercept(keep_room_short);
    CHECK_EQ(tick(polls, keys, 100, 0), 0);
    CHECK_EQ(tick(polls, keys + 100, WANTED - 100, 0), 0);
    CHECK_EQ(refusals(), 0);
    intercept(NULL);
    finish(polls, pairs, WANTED);
    polls_free(polls);
    free_pairs(pairs, WANTED);
}

static bool fail_one_doorbell_and_keep_room_short(long number, const long *args, long *result)
{
    static bool failed;
    if (number == SYS_io_submit && !failed && (*(struct ring_iocb **)args[2])->data == UINT64_MAX) {
        failed = true;
        *result = -EAGAIN;
        return true;
    }
    return keep_room_short(number, args, result);
}

TEST(rings_grow_also_when_the_doorbell_was_refused_once)
{
    enum { WANTED = 1200 };
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(WANTED);
    int64_t keys[WANTED];
    make_keys(pairs, keys, WANTED);
    room = 400;
    intercept(fail_one_doorbell_and_keep_room_short);
    CHECK_EQ(tick(polls, keys, 200, 0), 0);
    CHECK_EQ(tick(polls, keys + 200, 100, 0), 0); /* there is still room for it */
    CHECK_EQ(tick(polls, keys + 300, WANTED - 300, 0), 0);
    CHECK_EQ(refusals(), 0);
    intercept(NULL);
    finish(polls, pairs, WANTED);
    polls_free(polls);
    free_pairs(pairs, WANTED);
}

/* ---- io_getevents ---- */

TEST(a_sleep_that_fails_says_so_and_keeps_what_was_submitted)
{
    static const int errors[] = {EINTR, EINVAL, EFAULT, ENOSYS, EPERM};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        struct polls *polls = open_polls();
        struct pair *pairs = make_pairs(BATCH);
        int64_t keys[BATCH];
        make_keys(pairs, keys, BATCH);
        fail(SYS_io_getevents, errors[i], 1000);
        CHECK_EQ(tick(polls, keys, BATCH, LONG_NS), -errors[i]);
        CHECK_EQ(calls_of(SYS_io_getevents), 1);
        /* what is there needs no such call */
        make_ready(pairs[0]);
        CHECK_EQ(tick(polls, NULL, 0, LONG_NS), 1);
        CHECK_EQ(calls_of(SYS_io_getevents), 1);
        intercept(NULL);
        finish(polls, pairs + 1, BATCH - 1);
        polls_free(polls);
        check_let_go(pairs, BATCH);
    }
}

static struct pair pair_to_make_ready;

static bool complete_and_fail(long number, const long *args, long *result)
{
    (void)args;
    if (number != SYS_io_getevents)
        return false;
    make_ready(pair_to_make_ready);
    *result = -error_to_give;
    return true;
}

TEST(what_completes_in_a_sleep_that_fails_is_reported)
{
    static const int errors[] = {EINTR, EINVAL, EPERM};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        struct polls *polls = open_polls();
        pair_to_make_ready = make_pair();
        error_to_give = errors[i];
        intercept(complete_and_fail);
        CHECK_EQ(tick_one(polls, reading(pair_to_make_ready.ours), LONG_NS), 1);
        intercept(NULL);
        polls_free(polls);
        close_pair(pair_to_make_ready);
    }
}

/* ---- io_cancel ---- */

TEST(cancel_that_fails_is_fatal_and_destroy_lets_go)
{
    static const int errors[] = {EAGAIN, EFAULT, ENOSYS, EPERM, EACCES};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        for (size_t index = 0; index < BATCH; index++) {
            struct polls *polls = open_polls();
            struct pair *pairs = make_pairs(BATCH);
            int64_t keys[BATCH];
            make_keys(pairs, keys, BATCH);
            CHECK_EQ(tick(polls, keys, BATCH, 0), 0);
            CHECK_EQ(cancel(polls, keys, (long)index), 0);
            fail(SYS_io_cancel, errors[i], 1);
            CHECK_EQ(cancel(polls, keys + index, (long)(BATCH - index)), -errors[i]);
            CHECK_EQ(polls_destroy(polls), 0);
            book_closed();
            check_let_go(pairs, BATCH);
            intercept(NULL);
            polls_free(polls);
        }
    }
}

TEST(close_that_cannot_cancel_destroys)
{
    static const int errors[] = {EAGAIN, EINVAL, ENOSYS, EPERM};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        struct polls *polls = open_polls();
        struct pair *pairs = make_pairs(600);
        int64_t keys[600];
        make_keys(pairs, keys, 600);
        CHECK_EQ(tick(polls, keys, 600, 0), 0);
        fail(SYS_io_cancel, errors[i], 1000000);
        polls_close(polls);
        book_closed();
        CHECK_EQ(calls_of(SYS_io_destroy), 2);
        CHECK(calls_of(SYS_io_cancel) <= 601);
        CHECK_EQ(pool_idle_count(), 0);
        check_let_go(pairs, 600);
        polls_free(polls);
    }
}

/* A poll that is in flight although the kernel says that it is not: there is no event to wait for. */
TEST(cancel_that_never_ends_is_given_up)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(BATCH);
    int64_t keys[BATCH];
    struct timespec before, after;
    make_keys(pairs, keys, BATCH);
    CHECK_EQ(tick(polls, keys, BATCH, 0), 0);
    fail(SYS_io_cancel, EINVAL, 1);
    clock_gettime(CLOCK_MONOTONIC, &before);
    CHECK_EQ(cancel(polls, keys, BATCH), -ETIMEDOUT);
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK(after.tv_sec - before.tv_sec < 10);
    CHECK_EQ(polls_destroy(polls), 0);
    book_closed();
    check_let_go(pairs, BATCH);
    polls_free(polls);
}

/* ---- io_destroy ---- */

TEST(destroy_that_fails_says_so_and_ends_the_polls_for_us)
{
    static const int errors[] = {EINVAL, ENOSYS, EPERM};
    for (size_t i = 0; i < LENGTH(errors); i++) {
        struct polls *polls = open_polls();
        struct pair *pairs = make_pairs(600);
        int64_t keys[600];
        make_keys(pairs, keys, 600);
        CHECK_EQ(tick(polls, keys, 600, 0), 0);
        fail(SYS_io_destroy, errors[i], 1000);
        expect_leaks();
        CHECK_EQ(polls_destroy(polls), -errors[i]);
        CHECK_EQ(calls_of(SYS_io_destroy), 2);
        book_closed();
        make_ready(pairs[0]); /* in memory that is still there */
        CHECK_EQ(tick(polls, NULL, 0, LONG_NS), -ESHUTDOWN);
        CHECK_EQ(cancel(polls, keys, 600), 0);
        polls_free(polls);
        intercept(NULL);
        free_pairs(pairs, 600);
    }
}

TEST(a_stock_that_cannot_be_trimmed_does_no_harm)
{
    enum { WANTED = 4000 };
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(WANTED);
    int64_t keys[WANTED];
    make_keys(pairs, keys, WANTED);
    CHECK_EQ(tick(polls, keys, WANTED, 0), 0);
    uint64_t rings = statistics_of(polls).rings;
    CHECK(rings > POOL_IDLE_MAX + 1);
    fail(SYS_io_destroy, EPERM, 1000);
    expect_leaks();
    polls_free(polls);
    book_closed();
    while (pool_idle_count() > POOL_IDLE_MAX || calls_of(SYS_io_destroy) < rings - POOL_IDLE_MAX)
        usleep(1000);
    polls = open_polls();
    CHECK_EQ(tick(polls, keys, BATCH, 0), 0);
    finish(polls, pairs, BATCH);
    polls_free(polls);
    free_pairs(pairs, WANTED);
}

/* ---- events that are late: a kernel of our own ---- */

static struct ring_iocb *in_flight[64];
static size_t in_flight_count;
static struct ring_iocb *late[64]; /* cancelled; their events come when the test says */
static size_t late_count;
static unsigned long steps_until_late; /* of yields and naps */

static void post(const struct ring_iocb *iocb, int64_t result)
{
    uint32_t tail = fake.tail;
    fake.events[tail] = (struct ring_event){.data = iocb->data, .iocb = (uint64_t)(uintptr_t)iocb, .res = result};
    fake.tail = (tail + 1) % fake.nr;
    CHECK(fake.tail != fake.head);
}

static bool leave_flight(const struct ring_iocb *iocb)
{
    for (size_t i = 0; i < in_flight_count; i++) {
        if (in_flight[i] != iocb)
            continue;
        in_flight[i] = in_flight[--in_flight_count];
        return true;
    }
    return false;
}

static void complete(int64_t key)
{
    for (size_t i = 0; i < in_flight_count; i++) {
        struct ring_iocb *iocb = in_flight[i];
        if (iocb->fildes == (uint64_t)key / 2 && iocb->buf == ((key & 1) ? 4U : 1U)) {
            leave_flight(iocb);
            post(iocb, 1);
            return;
        }
    }
    CHECK(false); /* not in flight */
}

static void one_step(void)
{
    if (steps_until_late > 0 && --steps_until_late == 0) {
        while (late_count > 0)
            post(late[--late_count], 0);
    }
}

static void one_nap(void)
{
    one_step();
    advance_clock(SECOND_NS / 1000);
}

static bool be_the_kernel(long number, const long *args, long *result)
{
    *result = 0;
    if (number == SYS_io_setup) {
        *(unsigned long *)args[1] = (unsigned long)&fake;
    } else if (number == SYS_io_submit) {
        for (long i = 0; i < args[1]; i++) {
            struct ring_iocb *iocb = ((struct ring_iocb **)args[2])[i];
            for (size_t at = 0; at < in_flight_count; at++)
                CHECK(in_flight[at] != iocb); /* its memory is still in use */
            for (size_t at = 0; at < late_count; at++)
                CHECK(late[at] != iocb);
            CHECK(in_flight_count < LENGTH(in_flight));
            in_flight[in_flight_count++] = iocb;
        }
        *result = args[1];
    } else if (number == SYS_io_cancel) {
        struct ring_iocb *iocb = (struct ring_iocb *)args[1];
        if (leave_flight(iocb)) {
            late[late_count++] = iocb;
            *result = -EINPROGRESS;
        } else {
            *result = -EINVAL;
        }
    } else if (number == SYS_io_getevents) {
        const struct timespec *timeout = (const struct timespec *)args[4];
        struct ring_event *events = (struct ring_event *)args[3];
        while (fake.head != fake.tail && *result < args[2]) {
            events[(*result)++] = fake.events[fake.head];
            fake.head = (fake.head + 1) % fake.nr;
        }
        if (*result == 0)
            advance_clock((uint64_t)timeout->tv_sec * SECOND_NS + (uint64_t)timeout->tv_nsec);
    } else {
        CHECK_EQ(number, SYS_io_destroy);
    }
    return true;
}

static struct polls *open_fake_polls(void)
{
    reset_fake();
    in_flight_count = late_count = 0;
    steps_until_late = 0;
    intercept(be_the_kernel);
    on_yield = one_step;
    on_nap = one_nap;
    return open_polls();
}

TEST(cancel_waits_for_an_event_that_is_late)
{
    struct polls *polls = open_fake_polls();
    struct pair pair = make_pair();
    int64_t keys[] = {reading(pair.ours), writing(pair.ours), writing(pair.peer), reading(pair.peer)};
    for (unsigned long delay = 1; delay < 400; delay++) {
        tick(polls, keys, 4, 0);
        steps_until_late = delay;
        complete(keys[3]); /* of no concern to the cancel */
        CHECK_EQ(cancel(polls, keys, 3), 0);
        CHECK_EQ(late_count, 0);
        CHECK_EQ(steps_until_late, 0);
        CHECK_EQ(tick(polls, NULL, 0, 0), 1);
        CHECK_EQ(completions_of(keys[3]), delay);
        CHECK_EQ(statistics_of(polls).in_flight, 0);
    }
    polls_free(polls);
    close_pair(pair);
}

TEST(an_event_that_does_not_come_is_given_up)
{
    struct polls *polls = open_fake_polls();
    struct pair pair = make_pair();
    CHECK_EQ(tick_one(polls, reading(pair.ours), 0), 0);
    CHECK_EQ(cancel_one(polls, reading(pair.ours)), -ETIMEDOUT);
    CHECK_EQ(late_count, 1);
    CHECK_EQ(polls_destroy(polls), 0);
    book_closed();
    polls_free(polls);
    close_pair(pair);
}

TEST(a_late_event_never_completes_a_later_poll_of_its_key)
{
    struct polls *polls = open_fake_polls();
    struct pair pair = make_pair();
    int64_t key = reading(pair.ours);
    CHECK_EQ(tick_one(polls, key, 0), 0);
    CHECK_EQ(cancel_one(polls, key), -ETIMEDOUT);
    book_closed();
    /* somebody who goes on all the same */
    CHECK_EQ(tick_one(polls, key, 0), 0);
    steps_until_late = 1;
    one_step();
    CHECK_EQ(tick(polls, NULL, 0, SECOND_NS), 0);
    CHECK(is_awaited(key));
    complete(key);
    CHECK_EQ(tick(polls, NULL, 0, LONG_NS), 1);
    polls_free(polls);
    close_pair(pair);
}

/* The ring's array wraps around at any number of events. */
TEST(no_event_is_lost_where_the_ring_wraps)
{
    struct polls *polls = open_fake_polls();
    struct pair *pairs = make_pairs(40);
    int64_t keys[40];
    make_keys(pairs, keys, 40);
    for (int round = 0; round < 500; round++) {
        long count = 1 + (long)next_random(40);
        CHECK_EQ(tick(polls, keys, count, 0), 0);
        for (long i = 0; i < count; i++)
            complete(keys[i]);
        CHECK_EQ(tick(polls, NULL, 0, next_random(2)), count);
        CHECK_EQ(awaited(), 0);
    }
    polls_free(polls);
    free_pairs(pairs, 40);
}
