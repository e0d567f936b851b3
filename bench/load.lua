-- Send prepared requests for a while, wait for the last responses, then report as JSON.
--
-- By itself, wrk stops abruptly, and a request that is never answered appears in no figure. Here a
-- client with nothing more to send gets an empty request. Writing nothing succeeds, so wrk keeps
-- listening on that connection, and any response still missing at the end never came. The parent
-- process reads a sign of life while responses arrive, and stops wrk when there are no more.

local ffi = require("ffi")
ffi.cdef([[
    typedef struct { long seconds; long nanoseconds; } moment;
    int clock_gettime(int clock, moment *now);
    int getpid(void);
    int kill(int pid, int signal);
]])

local MONOTONIC = ffi.os == "OSX" and 6 or 1
local SIGINT = 2 -- makes wrk stop and report
local SIGN_SECONDS = 0.25 -- between two signs of life

local now = ffi.new("moment")

local function seconds()
    ffi.C.clock_gettime(MONOTONIC, now)
    return tonumber(now.seconds) + tonumber(now.nanoseconds) / 1e9
end

-- The worker thread sends.

sent, answered, in_time, refused, statuses = 0, 0, 0, 0, {}
local requests, window, start, finish = {}, nil, nil, nil
took = 0
local tried, next_sign = false, 0

function init(arguments)
    window = tonumber(arguments[1])
    local file = assert(io.open(arguments[2], "rb"))
    for text in file:read("*a"):gmatch("[^%z]+") do
        requests[#requests + 1] = text
    end
    file:close()
end

local function end_if_all_is_answered()
    if answered == sent then
        ffi.C.kill(ffi.C.getpid(), SIGINT)
    end
end

function request()
    if not tried then -- wrk asks for one request before it sends any
        tried = true
        return requests[1]
    end
    local moment = seconds()
    start = start or moment
    finish = start + window
    if moment >= finish then
        end_if_all_is_answered()
        return ""
    end
    sent = sent + 1
    return requests[(sent - 1) % #requests + 1]
end

local function says_when_to_come_back(headers)
    for name in pairs(headers) do
        if name:lower() == "retry-after" then
            return true
        end
    end
    return false
end

function response(status, headers)
    local moment = seconds()
    if moment >= next_sign then
        next_sign = moment + SIGN_SECONDS
        io.write("answered\n")
        io.flush()
    end
    answered = answered + 1
    took = moment - start
    statuses[tostring(status)] = (statuses[tostring(status)] or 0) + 1
    if status == 503 and says_when_to_come_back(headers) then
        refused = refused + 1
    end
    if moment < finish then
        if status >= 200 and status < 300 then
            in_time = in_time + 1
        end
    else
        end_if_all_is_answered()
    end
end

-- The main thread reports.

local thread

function setup(the_only_one)
    thread = the_only_one
end

function done(summary, latency)
    local counts = {}
    for status, count in pairs(thread:get("statuses")) do
        counts[#counts + 1] = string.format('"%s": %d', status, count)
    end
    local errors = summary.errors
    print(string.format(
        '{"sent": %d, "answered": %d, "in_time": %d, "refused": %d, "took": %.3f,'
            .. ' "statuses": {%s}, "broken": %d, "p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f}',
        thread:get("sent"), thread:get("answered"), thread:get("in_time"), thread:get("refused"),
        thread:get("took"), table.concat(counts, ", "), errors.connect + errors.read + errors.write,
        latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency.max / 1000
    ))
end
