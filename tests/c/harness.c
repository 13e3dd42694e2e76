#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "_ring.h"

/* Seconds after which a test that hangs is ended. */
#define GIVE_UP_AFTER 100

/* ---- the system underneath ---- */

static intercept_function *_Atomic interceptor;
static atomic_ulong calls[1024];
static atomic_ullong clock_offset;
static atomic_ulong clock_reads;
void (*on_yield)(void);
void (*on_nap)(void);
void (*after_wait)(void *lock);

void intercept(intercept_function *function)
{
    interceptor = function;
}

unsigned long calls_of(long number)
{
    return calls[number];
}

void forget_calls(void)
{
    for (size_t i = 0; i < sizeof(calls) / sizeof(*calls); i++)
        calls[i] = 0;
}

long forward(long number, const long *args)
{
    long result = syscall(number, args[0], args[1], args[2], args[3], args[4]);
    return result < 0 ? -errno : result;
}

long test_syscall(long number, ...);

long test_syscall(long number, ...)
{
    long args[5] = {0};
    va_list list;
    va_start(list, number);
    if (number == SYS_io_setup)
        args[0] = (long)va_arg(list, unsigned);
    else
        args[0] = (long)va_arg(list, unsigned long);
    int count = number == SYS_io_destroy ? 1 : number == SYS_io_setup ? 2 : number == SYS_io_getevents ? 5 : 3;
    for (int i = 1; i < count; i++)
        args[i] = va_arg(list, long);
    va_end(list);
    calls[number]++;
    intercept_function *function = interceptor;
    long result;
    if (function == NULL || !function(number, args, &result))
        result = forward(number, args);
    if (result < 0) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

int test_clock_gettime(clockid_t clock, struct timespec *now);

int test_clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = clock_gettime(clock, now);
    clock_reads++;
    unsigned long long offset = clock_offset;
    now->tv_sec += (time_t)(offset / SECOND_NS);
    now->tv_nsec += (long)(offset % SECOND_NS);
    if (now->tv_nsec >= SECOND_NS) {
        now->tv_nsec -= SECOND_NS;
        now->tv_sec++;
    }
    return result;
}

static int transfer_error;
static unsigned long transfers_to_fail;

void fail_transfers(int error, unsigned long times)
{
    transfer_error = error;
    transfers_to_fail = times;
}

static bool transfer_fails(void)
{
    if (transfers_to_fail == 0)
        return false;
    transfers_to_fail--;
    errno = transfer_error;
    return true;
}

ssize_t test_recv(int fd, void *buffer, size_t size, int flags);
ssize_t test_send(int fd, const void *buffer, size_t size, int flags);

ssize_t test_recv(int fd, void *buffer, size_t size, int flags)
{
    return transfer_fails() ? -1 : recv(fd, buffer, size, flags);
}

ssize_t test_send(int fd, const void *buffer, size_t size, int flags)
{
    return transfer_fails() ? -1 : send(fd, buffer, size, flags);
}

unsigned long reads_of_clock(void)
{
    return clock_reads;
}

void advance_clock(uint64_t ns)
{
    clock_offset += ns;
}

int test_sched_yield(void);

int test_sched_yield(void)
{
    if (on_yield != NULL)
        on_yield();
    return sched_yield();
}

int test_nanosleep(const struct timespec *nap, struct timespec *rest);

int test_nanosleep(const struct timespec *nap, struct timespec *rest)
{
    if (on_nap == NULL)
        return nanosleep(nap, rest);
    on_nap();
    return 0;
}

int test_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *lock, const struct timespec *until);

int test_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *lock, const struct timespec *until)
{
    int result = pthread_cond_timedwait(condition, lock, until);
    if (after_wait != NULL)
        after_wait(lock);
    return result;
}

/* ---- files ---- */

struct pair make_pair(void)
{
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    return (struct pair){.ours = fds[0], .peer = fds[1]};
}

struct pair *make_pairs(size_t count)
{
    struct pair *pairs = calloc(count, sizeof(*pairs));
    CHECK(pairs != NULL);
    for (size_t i = 0; i < count; i++)
        pairs[i] = make_pair();
    return pairs;
}

void close_pair(struct pair pair)
{
    close(pair.ours);
    close(pair.peer);
}

void free_pairs(struct pair *pairs, size_t count)
{
    for (size_t i = 0; i < count; i++)
        close_pair(pairs[i]);
    free(pairs);
}

void make_ready(struct pair pair)
{
    CHECK(write(pair.peer, "x", 1) == 1);
}

void drain(struct pair pair)
{
    char buffer[64];
    while (read(pair.ours, buffer, sizeof(buffer)) > 0)
        ;
}

bool sees_eof(int peer)
{
    char buffer[64];
    ssize_t got;
    do
        got = recv(peer, buffer, sizeof(buffer), MSG_DONTWAIT);
    while (got > 0);
    return got == 0 || errno == ECONNRESET; /* the latter if there was unread data */
}

void pin_to_one_cpu(void)
{
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof(set), &set) == 0);
    size_t cpu = 0;
    while (!CPU_ISSET(cpu, &set))
        cpu++;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    CHECK(sched_setaffinity(0, sizeof(set), &set) == 0);
}

/* ---- polls, with the book ---- */

static enum { IDLE, AWAITED, FORGIVEN } book[KEYS_MAX];
static unsigned completions[KEYS_MAX];
static int refused_with[KEYS_MAX];
static int64_t forgiven[64];
static size_t forgiven_count;
static size_t awaited_count;
static size_t refusal_count;

struct polls *open_polls(void)
{
    int error = 0;
    struct polls *polls = polls_open(-1, &error);
    if (polls == NULL)
        fprintf(stderr, "polls_open: %s\n", strerror(-error));
    CHECK(polls != NULL);
    return polls;
}

void book_submitted(const int64_t *keys, long count)
{
    for (long i = 0; i < count; i++) {
        CHECK(keys[i] >= 0 && keys[i] < KEYS_MAX);
        CHECK(book[keys[i]] == IDLE);
        book[keys[i]] = AWAITED;
        refused_with[keys[i]] = 0;
        awaited_count++;
    }
}

void enter(struct polls *polls, long result)
{
    const int64_t *out = polls_out(polls);
    for (long i = 0; i < result; i++) {
        bool is_refusal = out[i] < 0;
        int64_t key = is_refusal ? (-out[i] - 1) >> 12 : out[i];
        CHECK(key >= 0 && key < KEYS_MAX);
        if (book[key] == FORGIVEN)
            continue;
        CHECK(book[key] == AWAITED);
        book[key] = IDLE;
        awaited_count--;
        if (is_refusal) {
            CHECK_EQ(out[i], POLLS_REFUSED(key, (-out[i] - 1) & 0xfff));
            refused_with[key] = (int)((-out[i] - 1) & 0xfff);
            CHECK(refused_with[key] != 0);
            refusal_count++;
        } else {
            completions[key]++;
        }
    }
    while (forgiven_count > 0)
        book[forgiven[--forgiven_count]] = IDLE;
}

long tick(struct polls *polls, const int64_t *keys, long count, int64_t timeout_ns)
{
    book_submitted(keys, count);
    long result = polls_tick(polls, keys, count, timeout_ns);
    enter(polls, result);
    return result;
}

long tick_one(struct polls *polls, int64_t key, int64_t timeout_ns)
{
    return tick(polls, &key, 1, timeout_ns);
}

int cancel(struct polls *polls, const int64_t *keys, long count)
{
    int result = polls_cancel(polls, keys, count);
    for (long i = 0; i < count && result == 0; i++) {
        if (book[keys[i]] != AWAITED)
            continue;
        book[keys[i]] = IDLE;
        awaited_count--;
    }
    return result;
}

int cancel_one(struct polls *polls, int64_t key)
{
    return cancel(polls, &key, 1);
}

void forgive(int64_t key)
{
    if (book[key] == FORGIVEN)
        return;
    CHECK(book[key] == IDLE && forgiven_count < sizeof(forgiven) / sizeof(*forgiven));
    book[key] = FORGIVEN;
    forgiven[forgiven_count++] = key;
}

void book_closed(void)
{
    memset(book, 0, sizeof(book));
    awaited_count = 0;
}

bool is_awaited(int64_t key)
{
    return book[key] == AWAITED;
}

size_t awaited(void)
{
    return awaited_count;
}

unsigned completions_of(int64_t key)
{
    return completions[key];
}

int refusal_of(int64_t key)
{
    int error = refused_with[key];
    refused_with[key] = 0;
    return error;
}

size_t refusals(void)
{
    return refusal_count;
}

void tick_until(struct polls *polls, size_t count)
{
    CHECK(awaited_count >= count);
    size_t target = awaited_count - count;
    while (awaited_count > target)
        CHECK(tick(polls, NULL, 0, LONG_NS) > 0);
}

void finish(struct polls *polls, const struct pair *pairs, size_t count)
{
    for (size_t i = 0; i < count; i++)
        make_ready(pairs[i]);
    tick_until(polls, awaited_count);
    CHECK_EQ(tick(polls, NULL, 0, 0), 0);
    struct polls_statistics statistics = statistics_of(polls);
    CHECK(statistics.in_flight <= 1); /* the doorbell has no slot; a poll of own_fd may be there */
}

struct polls_statistics statistics_of(struct polls *polls)
{
    struct polls_statistics statistics;
    polls_get_statistics(polls, &statistics);
    return statistics;
}

uint32_t next_random(uint32_t below)
{
    static uint32_t state = 2463534242U;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % below;
}

/* ---- running ---- */

static struct test *tests;
static bool leaks_expected;

void expect_leaks(void)
{
    leaks_expected = true;
}

void add_test(struct test *test)
{
    test->next = tests;
    tests = test;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        for (struct test *test = tests; test != NULL; test = test->next)
            printf("%s\n", test->name);
        return 0;
    }
    struct rlimit files;
    CHECK(getrlimit(RLIMIT_NOFILE, &files) == 0);
    files.rlim_cur = files.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &files) == 0);
    for (struct test *test = tests; test != NULL; test = test->next) {
        if (strcmp(test->name, argv[1]) != 0)
            continue;
        alarm(GIVE_UP_AFTER);
        test->run();
        if (leaks_expected)
            _exit(0); /* before LeakSanitizer looks */
        return 0;
    }
    fprintf(stderr, "no test named %s\n", argv[1]);
    return 2;
}
