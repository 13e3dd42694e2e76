/* Load for a server: connections that send requests and take the answers, and how long that took.
 *
 *     load PORT CONNECTIONS ACTIVE SIZE [ANSWER [DEPTH [PACE]]]
 *
 * opens CONNECTIONS to 127.0.0.1, of which the first ACTIVE will be used and the others stay idle; says "ready"; then
 * for each line on stdin drives requests of SIZE bytes, which are answered with ANSWER bytes (SIZE if not given: an
 * echo), and tells in a line of JSON what became of it:
 *
 *     closed SECONDS [spin]   each connection has DEPTH requests (1) on their way; "spin": watch without sleeping
 *     open SECONDS RATE       requests are due at random moments, RATE a second, whatever the server does
 *
 * In the open loop a request is sent at once, behind those that are still on their way, and its latency counts from
 * when it was due: a server that stalls is charged for everything that would have happened meanwhile.
 *
 * With PACE, bytes a second, no connection takes its answers faster than that, in a closed loop: it looks every 10 ms.
 *
 * Every byte that comes is checked: byte i of a request and of an answer is i % 251. A byte that is wrong, a connection
 * that ends, or an answer that does not come, is the end of it all.
 *
 * Compiled with -DTLS, the connections are TLS ones (OpenSSL), and nobody's certificate is checked.
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

#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

#define SECOND 1000000000ULL
#define DRAIN_WITHIN (10 * SECOND)
#define AT_ONCE 256
#define MESSAGE_MAX (1 << 20)
#define PERIOD 251
#define PACE_EVERY (SECOND / 100)
#define PACED_BUFFER (1 << 18) /* who reads slowly has no large buffer to hide it */

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
#ifdef TLS
    SSL *tls;
#endif
    bool wants_out;      /* EPOLLOUT is on */
    uint64_t unsent;     /* bytes */
    uint64_t received;   /* bytes of the oldest request's answer */
    uint64_t allowance;  /* bytes that the pace allows to take */
    uint64_t *due;       /* of the requests on their way, a circular queue */
    uint32_t due_first, due_count, due_space;
    uint64_t completed;
};

static int epoll_fd;
static uint64_t size, answer, depth = 1, pace, in_flight, in_window, window_end;
static struct connection *connections;
static char payload[MESSAGE_MAX], scratch[MESSAGE_MAX];

/* How much was written to the connection or read from it, 0 if nothing can be at present. */
#ifdef TLS
static SSL_CTX *tls_context;

static size_t tls_outcome(struct connection *c, int result, const char *what)
{
    if (result > 0)
        return (size_t)result;
    int error = SSL_get_error(c->tls, result);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        return 0;
    fprintf(stderr, "load: %s failed (%d)\n", what, error);
    exit(1);
}

static size_t put(struct connection *c, const char *data, uint64_t count)
{
    ERR_clear_error();
    return tls_outcome(c, SSL_write(c->tls, data, (int)count), "SSL_write");
}

static size_t get(struct connection *c, char *into, uint64_t count)
{
    ERR_clear_error();
    return tls_outcome(c, SSL_read(c->tls, into, (int)count), "SSL_read");
}

static void shake_hands(struct connection *c)
{
    c->tls = SSL_new(tls_context);
    if (c->tls == NULL || SSL_set_fd(c->tls, c->fd) != 1 || SSL_connect(c->tls) != 1) {
        fprintf(stderr, "load: no TLS\n");
        exit(1);
    }
}
#else
static size_t put(struct connection *c, const char *data, uint64_t count)
{
    ssize_t sent = send(c->fd, data, count, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        die("send");
    return sent < 0 ? 0 : (size_t)sent;
}

static size_t get(struct connection *c, char *into, uint64_t count)
{
    ssize_t got = recv(c->fd, into, count, 0);
    if (got == 0 || (got < 0 && errno != EAGAIN)) {
        fprintf(stderr, "load: the server closed a connection\n");
        exit(1);
    }
    return got < 0 ? 0 : (size_t)got;
}

static void shake_hands(struct connection *c)
{
    (void)c;
}
#endif

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
        uint64_t rest = (c->unsent - 1) % size + 1; /* of the request that is being sent */
        size_t sent = put(c, payload + (size - rest), rest);
        if (sent == 0)
            break;
        c->unsent -= sent;
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

static void check(const char *data, size_t count, uint64_t at)
{
    while (count > 0) {
        uint64_t part = answer - at < count ? answer - at : count;
        if (memcmp(data, payload + at, part) != 0) {
            fprintf(stderr, "load: an answer is wrong\n");
            exit(1);
        }
        data += part;
        count -= part;
        at = 0;
    }
}

/* Takes what has come, as far as the pace allows; returns how many answers are complete. */
static unsigned receive(struct connection *c)
{
    unsigned complete = 0;
    uint64_t most = pace > 0 && c->allowance < sizeof(scratch) ? c->allowance : sizeof(scratch);
    size_t got = most > 0 ? get(c, scratch, most) : 0;
    if (got == 0)
        return 0;
    uint64_t now = now_ns();
    check(scratch, got, c->received % answer);
    c->received += got;
    c->allowance -= pace > 0 ? got : 0;
    while (c->due_count > 0 && c->received >= answer) {
        c->received -= answer;
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

static void receive_answer(struct connection *c)
{
    while (c->received < answer) {
        size_t got = get(c, scratch, answer - c->received);
        check(scratch, got, c->received);
        c->received += got;
    }
    c->received = 0;
}

static void connect_to(uint16_t port, struct connection *c)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, paced_buffer = PACED_BUFFER;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die("socket");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (pace > 0 && setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &paced_buffer, sizeof(paced_buffer)) < 0)
        die("SO_RCVBUF");
    shake_hands(c);
    /* one answer, so that the server has accepted it */
    for (uint64_t sent = 0; sent < size;)
        sent += put(c, payload + sent, size - sent);
    receive_answer(c);
    fcntl(c->fd, F_SETFL, fcntl(c->fd, F_GETFL) | O_NONBLOCK);
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

/* Takes answers; in a closed loop, each is followed by the next request. (What is read at once is more than a TLS
 * record, so nothing stays behind in OpenSSL where epoll would not see it.) */
static void serve_input(struct connection *c, bool closed)
{
    uint64_t now = 0;
    for (unsigned complete = receive(c); closed && complete > 0 && (now = now_ns()) < window_end; complete--)
        send_message(c, now);
}

static void handle(struct epoll_event *events, int count, bool closed)
{
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        if (events[i].events & EPOLLOUT)
            flush(c);
        if (events[i].events & ~(uint32_t)EPOLLOUT)
            serve_input(c, closed);
    }
}

static void run_closed(long active, bool spin)
{
    struct epoll_event events[AT_ONCE];
    for (uint64_t i = 0; i < depth; i++)
        for (long at = 0; at < active; at++)
            send_message(&connections[at], now_ns());
    while (now_ns() < window_end)
        handle(events, wait_until(events, window_end, spin), true);
}

/* Nobody sleeps until there is something to take: it is looked at when it is time. */
static void run_paced(long active, uint64_t give_up)
{
    for (uint64_t i = 0; i < depth; i++)
        for (long at = 0; at < active; at++)
            send_message(&connections[at], now_ns());
    for (uint64_t next = now_ns() + PACE_EVERY; in_flight > 0 && now_ns() < give_up; next += PACE_EVERY) {
        struct timespec until = {.tv_sec = (time_t)(next / SECOND), .tv_nsec = (long)(next % SECOND)};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        for (long at = 0; at < active; at++) {
            connections[at].allowance = pace * PACE_EVERY / SECOND;
            flush(&connections[at]);
            serve_input(&connections[at], true);
        }
    }
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
    if (argc < 5 || argc > 8) {
        fprintf(stderr, "usage: load PORT CONNECTIONS ACTIVE SIZE [ANSWER [DEPTH [PACE]]]\n");
        return 2;
    }
    long count = atol(argv[2]), active = atol(argv[3]);
    answer = size = (uint64_t)atoll(argv[4]);
    if (argc > 5)
        answer = (uint64_t)atoll(argv[5]);
    if (argc > 6)
        depth = (uint64_t)atoll(argv[6]);
    if (argc > 7)
        pace = (uint64_t)atoll(argv[7]);
    if (count < 1 || active < 1 || active > count || size < 1 || size > MESSAGE_MAX || answer < 1 ||
        answer > MESSAGE_MAX || depth < 1 || (argc > 7 && pace * PACE_EVERY / SECOND < 1)) {
        fprintf(stderr, "load: bad arguments\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1UL);
    for (size_t i = 0; i < sizeof(payload); i++)
        payload[i] = (char)(i % PERIOD);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    connections = calloc((size_t)count, sizeof(*connections));
    if (epoll_fd < 0 || connections == NULL)
        die("start");
#ifdef TLS
    tls_context = SSL_CTX_new(TLS_client_method());
    if (tls_context == NULL)
        die("SSL_CTX_new");
    SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
#endif
    for (long i = 0; i < count; i++) {
        connect_to((uint16_t)atoi(argv[1]), &connections[i]);
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
        if (open)
            run_open(active, atof(extra));
        else if (pace > 0)
            run_paced(active, window_end + DRAIN_WITHIN);
        else
            run_closed(active, fields == 3 && strcmp(extra, "spin") == 0);
        struct epoll_event events[AT_ONCE];
        while (in_flight > 0 && now_ns() < window_end + DRAIN_WITHIN)
            handle(events, wait_until(events, window_end + DRAIN_WITHIN, false), false);
        if (in_flight > 0) {
            fprintf(stderr, "load: %llu answers never came\n", (unsigned long long)in_flight);
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
        printf("{\"completed\": %llu, \"elapsed\": %.6f, \"throughput\": %.1f, \"p50\": %.2f, \"p99\": %.2f, \"p99.9\": %.2f, "
               "\"max\": %.2f, \"fairness\": %.5f, \"least\": %.5f, \"load_cpu\": %.3f}\n",
               (unsigned long long)latency_count, elapsed, (double)in_window / seconds, percentile_us(0.5), percentile_us(0.99),
               percentile_us(0.999), (double)latency_max / 1000,
               squares > 0 ? sum * sum / ((double)active * squares) : 0, sum > 0 ? least * (double)active / sum : 0,
               (cpu_seconds() - cpu) / elapsed);
        fflush(stdout);
    }
    return 0;
}
