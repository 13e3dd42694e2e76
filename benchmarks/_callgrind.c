/* Lets a program under callgrind say from where to where it wants to be counted. */
#include <valgrind/callgrind.h>

void counting_start(void)
{
    CALLGRIND_START_INSTRUMENTATION;
}

void counting_stop(void)
{
    CALLGRIND_STOP_INSTRUMENTATION;
}
