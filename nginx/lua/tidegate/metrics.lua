--- Counters per upstream, and their text for Prometheus.
--
-- Why: counting is on the path of every request, so it is a few additions in memory of this
-- worker. Once a second, and when the worker ends, the differences go to the shared dict, where
-- they add up over workers. Keys are bounded: upstreams that exist times a fixed set of counters;
-- those of an upstream that is removed are deleted.

local codec = require "tidegate.codec"
local ffi = require "ffi"
local load = require "tidegate.load"
local get_request = require("resty.core.base").get_request
local store = require "tidegate.store"
local tcp_metrics = require "tidegate.tcp_metrics"

local ctl = ngx.shared.tidegate_ctl
local met = ngx.shared.tidegate_metrics
local dat = ngx.shared.tidegate_dat
local certificates = ngx.shared.tidegate_certificates
local inflight = ngx.shared.tidegate_inflight

local cast = ffi.cast
local concat = table.concat
local exiting = ngx.worker.exiting
local ffi_new = ffi.new
local fill = ffi.fill
local floor = math.floor
local format = string.format
local get_method = ngx.req.get_method
local gmatch = string.gmatch
local gsub = string.gsub
local ipairs = ipairs
local ngx = ngx
local now = ngx.now
local pairs = pairs
local setmetatable = setmetatable
local start_time = ngx.req.start_time
local tonumber = tonumber
local tostring = tostring
local uintptr = ffi.typeof("uintptr_t")
local var = ngx.var

local METHODS = { "read", "write", "other" }
local METHOD_CLASS = {
    GET = 0, HEAD = 0, OPTIONS = 0,
    POST = 5, PUT = 5, PATCH = 5, DELETE = 5,
}
local BOUNDS = { 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10 }
local PEER_STATES = { "up", "draining", "probing", "idle", "ejected", "unhealthy" }
local HELD_RESULTS = { "resumed", "expired", "refused" }
local QUEUE_RESULTS = { "admitted", "expired", "refused" }

-- Places in the array of counters of one upstream.
local BUCKETS = 15          -- 0 to 14: method class * 5 + status class
local INFINITE = BUCKETS + #BOUNDS
local TOTAL = INFINITE + 1
local SUM = TOTAL + 1
local CONNECT_FAILURES = SUM + 1
local RETRIES = SUM + 2
local NO_PEER = SUM + 3
local HELD = SUM + 4        -- and the two after it
local QUEUE = HELD + #HELD_RESULTS
local EJECTIONS = QUEUE + #QUEUE_RESULTS
local CIRCUIT_OPENED = EJECTIONS + 1
local BUDGET_EXHAUSTED = EJECTIONS + 2
local RETRY_TOO_LATE = EJECTIONS + 3
local RETRIED_OK = EJECTIONS + 4
local RETRIED_FAILED = EJECTIONS + 5
local CHECKS_OK = EJECTIONS + 6
local CHECKS_FAILED = EJECTIONS + 7
local CIRCUIT_REFUSED = EJECTIONS + 8
local SIZE = EJECTIONS + 9
local COUNTER_SIZE = 8
local counters_type = ffi.typeof("double[?]")

local INFLIGHT_TTL = 5

local _M = {
    CONNECT_FAILURES = CONNECT_FAILURES,
    RETRIES = RETRIES,
    NO_PEER = NO_PEER,
    HELD_RESUMED = HELD,
    HELD_EXPIRED = HELD + 1,
    HELD_REFUSED = HELD + 2,
    QUEUE_ADMITTED = QUEUE,
    QUEUE_EXPIRED = QUEUE + 1,
    QUEUE_REFUSED = QUEUE + 2,
    EJECTIONS = EJECTIONS,
    CIRCUIT_OPENED = CIRCUIT_OPENED,
    CIRCUIT_REFUSED = CIRCUIT_REFUSED,
    BUDGET_EXHAUSTED = BUDGET_EXHAUSTED,
    RETRY_TOO_LATE = RETRY_TOO_LATE,
    RETRIED_OK = RETRIED_OK,
    RETRIED_FAILED = RETRIED_FAILED,
    CHECKS_OK = CHECKS_OK,
    CHECKS_FAILED = CHECKS_FAILED,
}

-- Upstream name → its counters in this worker, as long as something holds them: the balancer, a
-- request, or `dirty`.
local all = setmetatable({}, { __mode = "v" })
local dirty = {}    -- list of those that have counted since the last flush
local live = {}     -- address of a request → counters of the upstream it was sent to
local direct = false


--- Counters of upstream `name` in this worker: `{name, count (array; since the last flush),
-- inflight, dirty}`; `ended` once its requests leave something behind that the balancer has to
-- clear away at their end.
local function of(name)
    local entry = all[name]
    if not entry then
        entry = {
            name = name,
            count = ffi_new(counters_type, SIZE),
            inflight = 0,
            dirty = false,
        }
        all[name] = entry
    end
    return entry
end


_M.of = of


local function mark(entry)
    if not entry.dirty then
        entry.dirty = true
        dirty[#dirty + 1] = entry
    end
end


--- Adds one to the counter at `place` of upstream `name`.
function _M.add(name, place)
    local entry = of(name)
    entry.count[place] = entry.count[place] + 1
    mark(entry)
end


--- Notes that the current request is under way to the upstream of `entry`.
-- @return the entry that it was under way to before, if any
function _M.begin(entry)
    local request = tonumber(cast(uintptr, get_request()))
    local before = live[request]
    if before then
        before.inflight = before.inflight - 1
    end
    live[request] = entry
    entry.inflight = entry.inflight + 1
    return before
end


--- Whether `begin` was called for the current request.
function _M.is_under_way()
    return live[tonumber(cast(uintptr, get_request()))] ~= nil
end


--- Counts the current request, which has ended.
-- @return counters of its upstream, as `of` gives them
function _M.log()
    local request = tonumber(cast(uintptr, get_request()))
    local entry = live[request]
    if entry then
        live[request] = nil
        entry.inflight = entry.inflight - 1
    else
        entry = of(var.tidegate_upstream or "")
    end
    local count = entry.count
    local class = floor(ngx.status / 100) - 1
    if class < 0 or class > 4 then
        class = 4
    end
    local place = (METHOD_CLASS[get_method()] or 10) + class
    count[place] = count[place] + 1
    local seconds = now() - start_time()
    if seconds < 0 then
        seconds = 0
    end
    place = BUCKETS
    if seconds > 0.005 then
        local index = 2
        while index <= 11 and seconds > BOUNDS[index] do
            index = index + 1
        end
        place = BUCKETS + index - 1
    end
    count[place] = count[place] + 1
    count[TOTAL] = count[TOTAL] + 1
    count[SUM] = count[SUM] + seconds
    mark(entry)
    if direct then
        _M.flush()
    end
    return entry
end


-- `incr` with a start value, or `set`, would throw others out of a full dict.
local function add_up(key, delta)
    local value, err = met:incr(key, delta)
    if not value and err == "not found" then
        local ok
        ok, err = met:safe_add(key, delta)
        if not ok and err == "exists" then
            met:incr(key, delta)
        elseif not ok then
            ctl:incr("metrics_lost", 1, 0)
        end
    end
end


--- Adds what this worker has counted to the shared counters.
function _M.flush()
    local marked = dirty
    dirty = {}
    for _, entry in ipairs(marked) do
        entry.dirty = false
        local name, count = entry.name, entry.count
        if name == "" or store.number(name) then
            for place = 0, SIZE - 1 do
                if count[place] ~= 0 then
                    add_up(name .. "\1" .. place, count[place])
                end
            end
        end
        fill(count, SIZE * COUNTER_SIZE)
    end
    local busy = {}
    for name, entry in pairs(all) do
        if entry.inflight > 0 then
            busy[#busy + 1] = name .. "\1" .. entry.inflight .. "\2"
        end
    end
    inflight:safe_set(tostring(ngx.worker.pid()), concat(busy), INFLIGHT_TTL)
end


--- From now on each request is counted at once: this worker's timers do not run any more.
function _M.go_direct()
    direct = true
    _M.flush()
end


--- Deletes the counters of upstreams that were removed.
function _M.forget(names)
    for _, name in ipairs(names) do
        for place = 0, SIZE - 1 do
            met:delete(name .. "\1" .. place)
        end
        tcp_metrics.forget(name)
        store.breathe()
    end
end


local ESCAPES = { ["\\"] = "\\\\", ['"'] = '\\"', ["\n"] = "\\n" }


local function label(text)
    return (gsub(text, '[\\"\n]', ESCAPES))
end


local function number(value)
    return value % 1 == 0 and format("%d", value) or format("%.14g", value)
end


-- Requests under way per upstream, over all workers that live.
local function inflight_by_name()
    local sums = {}
    for _, pid in ipairs(inflight:get_keys(0)) do
        local text = tonumber(pid) and inflight:get(pid) or ""
        for name, count in gmatch(text, "(.-)\1(%d+)\2") do
            sums[name] = (sums[name] or 0) + tonumber(count)
        end
    end
    return sums
end


local function add_line(families, family, labels, amount)
    local lines = families[family]
    lines[#lines + 1] = "tidegate_" .. family .. "{" .. labels .. "} " .. number(amount)
end


-- The counters of an upstream; none of those that never were above 0.
local function counter_lines(families, name, tag)
    local function value(place)
        return met:get(name .. "\1" .. place)
    end
    local total = value(TOTAL)
    if not total then
        return
    end
    local function line(family, labels, place)
        local amount = value(place)
        if amount then
            add_line(families, family, labels, amount)
        end
    end
    for place = 0, BUCKETS - 1 do
        line("requests_total", tag .. ',method="' .. METHODS[floor(place / 5) + 1] .. '",code="'
             .. (place % 5 + 1) .. 'xx"', place)
    end
    local sum, lines = 0, families.request_duration_seconds
    local prefix = "tidegate_request_duration_seconds"
    for place = BUCKETS, INFINITE do
        sum = sum + (value(place) or 0)
        local bound = place == INFINITE and "+Inf" or BOUNDS[place - BUCKETS + 1]
        lines[#lines + 1] = prefix .. "_bucket{" .. tag .. ',le="' .. bound .. '"} ' .. number(sum)
    end
    lines[#lines + 1] = prefix .. "_sum{" .. tag .. "} " .. number(value(SUM) or 0)
    lines[#lines + 1] = prefix .. "_count{" .. tag .. "} " .. number(sum)
    line("upstream_connect_failures_total", tag, CONNECT_FAILURES)
    line("upstream_retries_total", tag, RETRIES)
    line("no_peer_total", tag, NO_PEER)
    line("ejections_total", tag, EJECTIONS)
    line("circuit_opened_total", tag, CIRCUIT_OPENED)
    line("circuit_refused_total", tag, CIRCUIT_REFUSED)
    line("retries_refused_total", tag .. ',reason="budget"', BUDGET_EXHAUSTED)
    line("retries_refused_total", tag .. ',reason="timeout"', RETRY_TOO_LATE)
    line("retried_requests_total", tag .. ',result="ok"', RETRIED_OK)
    line("retried_requests_total", tag .. ',result="failed"', RETRIED_FAILED)
    line("checks_total", tag .. ',result="ok"', CHECKS_OK)
    line("checks_total", tag .. ',result="failed"', CHECKS_FAILED)
    for index, result in ipairs(HELD_RESULTS) do
        line("held_requests_total", tag .. ',result="' .. result .. '"', HELD + index - 1)
    end
    for index, result in ipairs(QUEUE_RESULTS) do
        line("queue_requests_total", tag .. ',result="' .. result .. '"', QUEUE + index - 1)
    end
end


-- One upstream's lines, by family. What is 0 is left out, but for the peers that are up.
local function upstream_lines(families, name, busy, open, counts_of)
    local tag = 'upstream="' .. label(name) .. '"'
    counter_lines(families, name, tag)
    if busy then
        add_line(families, "requests_in_flight", tag, busy)
    end
    if open then
        add_line(families, "tcp_connections_open", tag, open)
    end
    tcp_metrics.each(name, function(family, labels, amount)
        add_line(families, family, tag .. labels, amount)
    end)
    local blob = name ~= "" and store.get(name)
    if blob then
        local counts, circuit = counts_of(name, blob)
        for _, state in ipairs(PEER_STATES) do
            if counts[state] > 0 or state == "up" then
                add_line(families, "peers", tag .. ',state="' .. state .. '"', counts[state])
            end
        end
        if circuit then
            add_line(families, "circuit_state", tag .. ',state="' .. circuit .. '"', 1)
        end
        local queue_cell = codec.head(blob).queue_cell
        local queued = queue_cell ~= 0 and load.sum(queue_cell) or 0
        if queued > 0 then
            add_line(families, "queue_length", tag, queued)
        end
    end
end


local UPSTREAM_FAMILIES = {
    { "requests_total", "counter", "Requests by upstream, method class and status class." },
    { "request_duration_seconds", "histogram", "Time from a request's first byte to its end." },
    { "requests_in_flight", "gauge", "Requests under way or held." },
    { "upstream_connect_failures_total", "counter", "Connections that a peer did not accept." },
    { "upstream_retries_total", "counter", "Requests tried again on another peer." },
    { "no_peer_total", "counter", "Times that there was no peer for a request." },
    { "held_requests_total", "counter", "Requests that waited for a peer, by how that ended." },
    { "queue_length", "gauge", "Requests that wait for a peer with room." },
    { "queue_requests_total", "counter", "Requests that met only full peers, and how it ended." },
    { "retried_requests_total", "counter", "Requests sent to more than one peer, by their end." },
    { "retries_refused_total", "counter", "Retries that the policy's budget or time forbade." },
    { "ejections_total", "counter", "Peers left alone for some time because requests failed." },
    { "checks_total", "counter", "Health checks by result." },
    { "circuit_opened_total", "counter", "Times that the circuit of an upstream has opened." },
    { "circuit_refused_total", "counter", "Requests answered 503 because the circuit was open." },
    { "circuit_state", "gauge", "1 for the state of the circuit, where there is one." },
    { "peers", "gauge", "Peers by state; idle ones have weight 0 or another's address." },
}
for _, family in ipairs(tcp_metrics.families) do
    UPSTREAM_FAMILIES[#UPSTREAM_FAMILIES + 1] = family
end


--- Prints all metrics in Prometheus' text format. May yield.
-- @param facts `{generation, counts (of peers by state, and state of the circuit, of an upstream's
--   name and value), nginx = {name = count}}`
function _M.print(facts)
    _M.flush()
    local busy, open, families = inflight_by_name(), tcp_metrics.open_by_name(), {}
    for _, family in ipairs(UPSTREAM_FAMILIES) do
        families[family[1]] = {}
    end
    local names = { "" }
    for _, name in ipairs(store.names()) do
        names[#names + 1] = name
    end
    table.sort(names)
    for _, name in ipairs(names) do
        upstream_lines(families, name, busy[name], open[name], facts.counts)
        store.breathe()
    end
    for _, family in ipairs(UPSTREAM_FAMILIES) do
        local name, lines = "tidegate_" .. family[1], families[family[1]]
        if #lines > 0 then
            ngx.print("# HELP ", name, " ", family[3], "\n# TYPE ", name, " ", family[2], "\n",
                      concat(lines, "\n"), "\n")
        end
    end
    local summary = store.summary()
    local function single(name, kind, help, value, labels)
        ngx.print("# HELP tidegate_", name, " ", help, "\n# TYPE tidegate_", name, " ", kind,
                  "\ntidegate_", name, labels or "", " ", number(value), "\n")
    end
    single("membership_revision", "gauge", "Revision of the membership in force.",
           summary.revision)
    single("membership_persisted_revision", "gauge", "Revision that is safe on disk.",
           ctl:get("persisted_revision") or 0)
    single("membership_upstreams", "gauge", "Upstreams in force.", summary.upstreams)
    single("last_push_timestamp_seconds", "gauge", "Unix time of the last push applied; 0: none.",
           summary.pushed_at or 0)
    single("site_generation_info", "gauge", "The generation of the site that workers run.", 1,
           '{generation="' .. facts.generation .. '"}')
    single("site_changes_total", "counter", "Site changes that came through.",
           ctl:get("site_changes") or 0)
    single("site_refusals_total", "counter", "Site changes that were refused.",
           ctl:get("site_refusals") or 0)
    single("load_cells", "gauge", "Places for counting load that are in use.", load.used())
    single("load_cells_capacity", "gauge", "Places for counting load.", load.CAPACITY)
    single("workers", "gauge", "Worker processes configured.", ngx.worker.count())
    single("metrics_lost_total", "counter", "Increments lost because their dict is full.",
           ctl:get("metrics_lost") or 0)
    single("health_lost_total", "counter", "Findings on peers lost because their dict is full.",
           ctl:get("health_lost") or 0)
    local free, capacity = {}, {}
    for _, item in ipairs({ { "membership", dat }, { "pointers", ngx.shared.tidegate_ptr },
                            { "control", ctl }, { "metrics", met },
                            { "certificates", certificates },
                            { "health", ngx.shared.tidegate_health } }) do
        free[#free + 1] = 'tidegate_shared_dict_free_bytes{dict="' .. item[1] .. '"} '
            .. number(item[2]:free_space())
        capacity[#capacity + 1] = 'tidegate_shared_dict_capacity_bytes{dict="' .. item[1] .. '"} '
            .. number(item[2]:capacity())
    end
    ngx.print("# HELP tidegate_shared_dict_free_bytes Room left in whole pages.\n",
              "# TYPE tidegate_shared_dict_free_bytes gauge\n", concat(free, "\n"),
              "\n# HELP tidegate_shared_dict_capacity_bytes Size of the shared dicts.\n",
              "# TYPE tidegate_shared_dict_capacity_bytes gauge\n", concat(capacity, "\n"), "\n")
    local lines = {}
    for state, count in pairs(facts.nginx) do
        lines[#lines + 1] = 'tidegate_nginx_connections{state="' .. state .. '"} ' .. count
    end
    table.sort(lines)
    ngx.print("# HELP tidegate_nginx_connections Client connections by state.\n",
              "# TYPE tidegate_nginx_connections gauge\n", concat(lines, "\n"), "\n")
end


--- Whether this worker has been told to end.
_M.exiting = exiting


return _M
