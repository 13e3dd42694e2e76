/* Load for an echo server: connections that send messages and take the echoes, and how long that took.
 *
 *     load PORT CONNECTIONS ACTIVE SIZE
 *
 * opens CONNECTIONS to 127.0.0.1, of which the first ACTIVE will be used and the others stay idle; says "ready"; then for
 * each line on stdin drives messages of SIZE bytes and answers with a line of JSON:
 *
 *     closed SECONDS [spin]   each connection sends when the last echo has come; "spin": watch without sleeping
 *     open SECONDS RATE       messages are due at random moments, RATE a second, whatever the server does
 *
 * In the open loop a message is sent at once, behind those that are still on their way, and its latency counts from
 * when it was due: a server that stalls is charged for everything that would have happened meanwhile.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000ULL
#define DRAIN_WITHIN (10 * SECOND)
#define AT_ONCE 256
#define MESSAGE_MAX (1 << 20)

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

/* ---- latencies: counts in buckets that are less than 1 % wide ---- */

#define SUB_BITS 7
#define SUB (1u << SUB_BITS)
#define BUCKETS ((64 - SUB_BITS + 1) * SUB)

static uint64_t buckets[BUCKETS];
static uint64_t latency_count, latency_max;

static void record(uint64_t ns)
{
    unsigned exponent = ns < SUB ? 0 : 63 - (unsigned)__builtin_clzll(ns) - SUB_BITS + 1;
    uint64_t sub = exponent == 0 ? ns : (ns >> (exponent - 1)) & (SUB - 1);
    buckets[exponent * SUB + sub]++;
    latency_count++;
    if (ns > latency_max)
        latency_max = ns;
}

static double percentile_us(double share)
{
    uint64_t wanted = (uint64_t)ceil(share * (double)latency_count), seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += buckets[i];
        if (seen >= wanted && seen > 0) {
            unsigned exponent = i / SUB;
            uint64_t sub = i % SUB;
            double low = exponent == 0 ? (double)sub : (double)((SUB + sub) << (exponent - 1));
            double width = exponent == 0 ? 1 : (double)(1ULL << (exponent - 1));
            return (low + width / 2) / 1000;
        }
    }
    return 0;
}

/* ---- connections ---- */

struct connection {
    int fd;
    bool wants_out;      /* EPOLLOUT is on */
    uint64_t unsent;     /* bytes; they all are 'x' */
    uint64_t received;   /* bytes of the oldest message's echo */
    uint64_t *due;       /* of the messages on their way, a circular queue */
    uint32_t due_first, due_count, due_space;
    uint64_t completed;
};

static int epoll_fd;
static uint64_t size, in_flight, in_window, window_end;
static struct connection *connections;
static char payload[MESSAGE_MAX], scratch[MESSAGE_MAX];

static void watch_connection(struct connection *c, int operation, bool out)
{
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &event) < 0)
        die("epoll_ctl");
    c->wants_out = out;
}

static void flush(struct connection *c)
{
    while (c->unsent > 0) {
        ssize_t sent = send(c->fd, payload, c->unsent < MESSAGE_MAX ? c->unsent : MESSAGE_MAX, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            die("send");
        if (sent < 0)
            break;
        c->unsent -= (uint64_t)sent;
    }
    if (c->wants_out != (c->unsent > 0))
        watch_connection(c, EPOLL_CTL_MOD, c->unsent > 0);
}

static void send_message(struct connection *c, uint64_t due)
{
    if (c->due_count == c->due_space) {
        uint32_t space = c->due_space == 0 ? 4 : 2 * c->due_space;
        uint64_t *grown = malloc(space * sizeof(*grown));
        if (grown == NULL)
            die("malloc");
        for (uint32_t i = 0; i < c->due_count; i++)
            grown[i] = c->due[(c->due_first + i) % c->due_space];
        free(c->due);
        c->due = grown;
        c->due_first = 0;
        c->due_space = space;
    }
    c->due[(c->due_first + c->due_count++) % c->due_space] = due;
    c->unsent += size;
    in_flight++;
    flush(c);
}

/* Takes what has come; returns how many messages are complete. */
static unsigned receive(struct connection *c)
{
    unsigned complete = 0;
    ssize_t got = recv(c->fd, scratch, sizeof(scratch), 0);
    if (got == 0 || (got < 0 && errno != EAGAIN)) {
        fprintf(stderr, "the server closed a connection\n");
        exit(1);
    }
    if (got < 0)
        return 0;
    uint64_t now = now_ns();
    c->received += (uint64_t)got;
    while (c->due_count > 0 && c->received >= size) {
        c->received -= size;
        record(now - c->due[c->due_first]);
        c->due_first = (c->due_first + 1) % c->due_space;
        c->due_count--;
        c->completed++;
        in_flight--;
        in_window += now < window_end;
        complete++;
    }
    return complete;
}

static int connect_to(uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1;
    char byte = 'x';
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket");
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    /* one echo, so that the server has accepted it */
    if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1 || recv(fd, &byte, 1, 0) != 1)
        die("first echo");
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return fd;
}

/* ---- the loops ---- */

static int wait_until(struct epoll_event *events, uint64_t until, bool spin)
{
    struct timespec timeout = {0, 0};
    uint64_t now = now_ns();
    if (!spin && until > now) {
        timeout.tv_sec = (time_t)((until - now) / SECOND);
        timeout.tv_nsec = (long)((until - now) % SECOND);
    }
    int count = epoll_pwait2(epoll_fd, events, AT_ONCE, &timeout, NULL);
    if (count < 0 && errno != EINTR)
        die("epoll_pwait2");
    return count < 0 ? 0 : count;
}

static void handle(struct epoll_event *events, int count, bool closed)
{
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        if (events[i].events & EPOLLOUT)
            flush(c);
        if ((events[i].events & ~(uint32_t)EPOLLOUT) && receive(c) > 0 && closed) {
            uint64_t now = now_ns();
            if (now < window_end)
                send_message(c, now);
        }
    }
}

static void run_closed(long active, bool spin)
{
    struct epoll_event events[AT_ONCE];
    for (long i = 0; i < active; i++)
        send_message(&connections[i], now_ns());
    while (now_ns() < window_end)
        handle(events, wait_until(events, window_end, spin), true);
}

static uint64_t random_state = 88172645463325252ULL;

static double random_share(void) /* xorshift64; in (0, 1] */
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (double)((random_state >> 11) + 1) / 9007199254740992.0;
}

static void run_open(long active, double rate)
{
    struct epoll_event events[AT_ONCE];
    long next = 0;
    double due = (double)now_ns();
    for (;;) {
        due += -log(random_share()) * SECOND / rate;
        if (due >= (double)window_end)
            break;
        do
            handle(events, wait_until(events, (uint64_t)due, false), false);
        while (now_ns() < (uint64_t)due);
        send_message(&connections[next], (uint64_t)due);
        next = next + 1 == active ? 0 : next + 1;
    }
    while (now_ns() < window_end)
        handle(events, wait_until(events, window_end, false), false);
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: load PORT CONNECTIONS ACTIVE SIZE\n");
        return 2;
    }
    long count = atol(argv[2]), active = atol(argv[3]);
    size = (uint64_t)atoll(argv[4]);
    if (count < 1 || active < 1 || active > count || size < 1 || size > MESSAGE_MAX) {
        fprintf(stderr, "load: bad arguments\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1UL);
    memset(payload, 'x', sizeof(payload));
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    connections = calloc((size_t)count, sizeof(*connections));
    if (epoll_fd < 0 || connections == NULL)
        die("start");
    for (long i = 0; i < count; i++) {
        connections[i].fd = connect_to((uint16_t)atoi(argv[1]));
        watch_connection(&connections[i], EPOLL_CTL_ADD, false);
    }
    printf("ready\n");
    fflush(stdout);

    char line[128], kind[16], extra[32];
    while (fgets(line, sizeof(line), stdin) != NULL) {
        double seconds = 0;
        int fields = sscanf(line, "%15s %lf %31s", kind, &seconds, extra);
        bool closed = fields >= 2 && strcmp(kind, "closed") == 0, open = fields == 3 && strcmp(kind, "open") == 0;
        if (!closed && !open) {
            fprintf(stderr, "load: bad command: %s", line);
            return 2;
        }
        memset(buckets, 0, sizeof(buckets));
        latency_count = latency_max = in_window = 0;
        for (long i = 0; i < active; i++)
            connections[i].completed = 0;
        double cpu = cpu_seconds();
        uint64_t start = now_ns();
        window_end = start + (uint64_t)(seconds * (double)SECOND);
        if (closed)
            run_closed(active, fields == 3 && strcmp(extra, "spin") == 0);
        else
            run_open(active, atof(extra));
        struct epoll_event events[AT_ONCE];
        while (in_flight > 0 && now_ns() < window_end + DRAIN_WITHIN)
            handle(events, wait_until(events, window_end + DRAIN_WITHIN, false), false);
        if (in_flight > 0) {
            fprintf(stderr, "load: %llu echoes never came\n", (unsigned long long)in_flight);
            return 1;
        }
        double elapsed = (double)(now_ns() - start) / SECOND;

        /* Jain's index: 1 if all connections got the same, 1/n if one got everything */
        double sum = 0, squares = 0, least = INFINITY;
        for (long i = 0; i < active; i++) {
            double completed = (double)connections[i].completed;
            sum += completed;
            squares += completed * completed;
            least = completed < least ? completed : least;
        }
        printf("{\"completed\": %llu, \"throughput\": %.1f, \"p50\": %.2f, \"p99\": %.2f, \"p99.9\": %.2f, "
               "\"max\": %.2f, \"fairness\": %.5f, \"least\": %.5f, \"load_cpu\": %.3f}\n",
               (unsigned long long)latency_count, (double)in_window / seconds, percentile_us(0.5), percentile_us(0.99),
               percentile_us(0.999), (double)latency_max / 1000,
               squares > 0 ? sum * sum / ((double)active * squares) : 0, sum > 0 ? least * (double)active / sum : 0,
               (cpu_seconds() - cpu) / elapsed);
        fflush(stdout);
    }
    return 0;
}
