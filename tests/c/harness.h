/* What the test programs of the C core share. A program runs the one test that it is given by name.
 *
 * All polling goes through tick() and cancel(), which keep a book of every key: a key that is reported must be awaited,
 * so nothing can be reported twice or after its cancel; and finish() shows that nothing is lost.
 */
#ifndef AIOPOLL_TEST_HARNESS_H
#define AIOPOLL_TEST_HARNESS_H

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "_polls.h"
#include "_pool.h"

#define SECOND_NS INT64_C(1000000000)
/* Longer than anything should take: only a failing test waits for so long. */
#define LONG_NS (20 * SECOND_NS)

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition);  \
            abort();                                                                       \
        }                                                                                  \
    } while (0)

#define CHECK_EQ(actual, expected)                                                                       \
    do {                                                                                                 \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);                      \
        if (actual_ != expected_) {                                                                      \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #actual, actual_, expected_); \
            abort();                                                                                     \
        }                                                                                                \
    } while (0)

struct test {
    const char *name;
    void (*run)(void);
    struct test *next;
};

void add_test(struct test *test);

#define TEST(title)                                                              \
    static void title(void);                                                     \
    __attribute__((constructor)) static void add_##title(void)                   \
    {                                                                            \
        static struct test test = {.name = #title, .run = title, .next = NULL}; \
        add_test(&test);                                                         \
    }                                                                            \
    static void title(void)

/* ---- the system underneath ---- */

/* May answer a system call of the core in the kernel's place: true, with *result a count or a negative errno. */
typedef bool intercept_function(long number, const long *args, long *result);

void intercept(intercept_function *function);
unsigned long calls_of(long number); /* how many the core has made, answered by whomever */
void forget_calls(void);
long forward(long number, const long *args); /* to the kernel; a negative errno where it fails */
void advance_clock(uint64_t ns);             /* for the core; nobody else notices */
unsigned long reads_of_clock(void);          /* by the core */
void fail_transfers(int error, unsigned long times); /* the next recv() and send() of the core give it instead */
/* NULL, or called in the core's sched_yield(), instead of its nanosleep(), and at the end of its pthread_cond_timedwait(),
 * while `lock` is held again. */
extern void (*on_yield)(void);
extern void (*on_nap)(void);
extern void (*after_wait)(void *lock);

/* Memory that the kernel may still use is never freed: a test in which io_destroy() fails leaks by design. */
void expect_leaks(void);

/* ---- files ---- */

struct pair {
    int ours; /* polled */
    int peer;
};

struct pair make_pair(void);
struct pair *make_pairs(size_t count);
void close_pair(struct pair pair);
void free_pairs(struct pair *pairs, size_t count);
void make_ready(struct pair pair);
void drain(struct pair pair);
bool sees_eof(int peer); /* at once, without waiting */

static inline int64_t reading(int fd)
{
    return 2 * (int64_t)fd;
}

static inline int64_t writing(int fd)
{
    return 2 * (int64_t)fd + 1;
}

void pin_to_one_cpu(void);

/* ---- polls, with the book ---- */

#define KEYS_MAX 65536

struct polls *open_polls(void);
/* polls_tick(), checked against the book. */
long tick(struct polls *polls, const int64_t *keys, long count, int64_t timeout_ns);
long tick_one(struct polls *polls, int64_t key, int64_t timeout_ns);
/* Takes what polls_tick() returned into the book; tick() without the call. */
void enter(struct polls *polls, long result);
void book_submitted(const int64_t *keys, long count);
int cancel(struct polls *polls, const int64_t *keys, long count);
int cancel_one(struct polls *polls, int64_t key);
void forgive(int64_t key); /* cancelled while a tick is under way: it may be reported or not */
void book_closed(void);    /* after polls_close(), polls_destroy() or a fatal error: nothing is awaited any more */

bool is_awaited(int64_t key);
size_t awaited(void);
unsigned completions_of(int64_t key);
int refusal_of(int64_t key); /* the errno, 0 for none; then forgotten */
size_t refusals(void);

/* Makes every pair ready and ticks until nothing is awaited; fails if that does not come to an end. */
void finish(struct polls *polls, const struct pair *pairs, size_t count);
/* Ticks until `count` keys more have completed or been refused. */
void tick_until(struct polls *polls, size_t count);

struct polls_statistics statistics_of(struct polls *polls);

uint32_t next_random(uint32_t below);

#endif
