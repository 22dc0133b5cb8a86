--- All metrics of this instance as text for Prometheus.
--
-- Why apart from `tidegate.metrics`: that is on the path of every request, this only reads. With
-- ten thousand upstreams the text has many MB, which no worker shall hold at once: families are
-- gone through one after the other, and what has come together is sent before there is more.

local codec = require "tidegate.codec"
local load = require "tidegate.load"
local metrics = require "tidegate.metrics"
local store = require "tidegate.store"
local tcp_metrics = require "tidegate.tcp_metrics"

local ctl = ngx.shared.tidegate_ctl
local shared = ngx.shared

local collect = collectgarbage
local concat = table.concat
local count_of = metrics.value
local format = string.format
local gsub = string.gsub
local ipairs = ipairs
local ngx = ngx
local pairs = pairs
local setmetatable = setmetatable
local sort = table.sort
local tonumber = tonumber

local CHUNK = 500       -- lines that are sent at a time
local STEP = 512        -- what the collector is told to do then, in kB: more than these have taken
local PEER_STATES = { "up", "draining", "probing", "idle", "ejected", "unhealthy" }
local DICTS = {
    { "membership", "tidegate_dat" }, { "pointers", "tidegate_ptr" }, { "control", "tidegate_ctl" },
    { "metrics", "tidegate_metrics" }, { "certificates", "tidegate_certificates" },
    { "health", "tidegate_health" },
}

-- Name, kind, help, and each series: its labels and the place of its counter.
local COUNTERS = {
    { "requests_total", "counter", "Requests by upstream, method class and status class.",
      metrics.REQUESTS },
    { "upstream_connect_failures_total", "counter", "Connections that a peer did not accept.",
      { { "", metrics.CONNECT_FAILURES } } },
    { "upstream_retries_total", "counter", "Requests tried again on another peer.",
      { { "", metrics.RETRIES } } },
    { "no_peer_total", "counter", "Times that there was no peer for a request.",
      { { "", metrics.NO_PEER } } },
    { "held_requests_total", "counter", "Requests that waited for a peer, by how that ended.",
      { { ',result="resumed"', metrics.HELD_RESUMED },
        { ',result="expired"', metrics.HELD_EXPIRED },
        { ',result="refused"', metrics.HELD_REFUSED } } },
    { "queue_requests_total", "counter", "Requests that met only full peers, and how it ended.",
      { { ',result="admitted"', metrics.QUEUE_ADMITTED },
        { ',result="expired"', metrics.QUEUE_EXPIRED },
        { ',result="refused"', metrics.QUEUE_REFUSED } } },
    { "retried_requests_total", "counter", "Requests sent to more than one peer, by their end.",
      { { ',result="ok"', metrics.RETRIED_OK }, { ',result="failed"', metrics.RETRIED_FAILED } } },
    { "retries_refused_total", "counter", "Retries that the policy's budget or time forbade.",
      { { ',reason="budget"', metrics.BUDGET_EXHAUSTED },
        { ',reason="timeout"', metrics.RETRY_TOO_LATE } } },
    { "ejections_total", "counter", "Peers left alone for some time because requests failed.",
      { { "", metrics.EJECTIONS } } },
    { "checks_total", "counter", "Health checks by result.",
      { { ',result="ok"', metrics.CHECKS_OK }, { ',result="failed"', metrics.CHECKS_FAILED } } },
    { "circuit_opened_total", "counter", "Times that the circuit of an upstream has opened.",
      { { "", metrics.CIRCUIT_OPENED } } },
    { "circuit_refused_total", "counter", "Requests answered 503 because the circuit was open.",
      { { "", metrics.CIRCUIT_REFUSED } } },
}

local ESCAPES = { ["\\"] = "\\\\", ['"'] = '\\"', ["\n"] = "\\n" }

local Text = {}
Text.__index = Text

local _M = {}


local function label(text)
    return (gsub(text, '[\\"\n]', ESCAPES))
end


local function number(value)
    return value % 1 == 0 and format("%d", value) or format("%.14g", value)
end


local function new_text()
    return setmetatable({ parts = {}, lines = 0, name = "", head = nil }, Text)
end


-- Sends what has come together, and waits until it is gone.
function Text:send()
    ngx.print(concat(self.parts))
    self.parts, self.lines = {}, 0
    collect("step", STEP)
    ngx.flush(true)
end


-- Begins a family; one without a line is left out.
function Text:family(name, kind, help)
    self.name = "tidegate_" .. name
    self.head = "# HELP " .. self.name .. " " .. help .. "\n# TYPE " .. self.name .. " " .. kind
        .. "\n"
end


-- Adds a line to the family; of a part of a histogram, with the end of its name.
function Text:add(labels, amount, ending)
    local parts = self.parts
    if self.head then
        parts[#parts + 1] = self.head
        self.head = nil
    end
    parts[#parts + 1] = self.name .. (ending or "")
        .. (labels == "" and " " or "{" .. labels .. "} ") .. number(amount) .. "\n"
    self.lines = self.lines + 1
    if self.lines >= CHUNK then
        self:send()
    end
end


-- A family of one line.
function Text:single(name, kind, help, amount, labels)
    self:family(name, kind, help)
    self:add(labels or "", amount)
end


-- Calls `each(name, tag)` for every one of `upstreams`, and lets other requests run meanwhile.
local function for_each(upstreams, each)
    for _, upstream in ipairs(upstreams) do
        each(upstream.name, upstream.tag)
        store.breathe()
    end
end


local function print_counters(text, counted)
    for _, counter in ipairs(COUNTERS) do
        text:family(counter[1], counter[2], counter[3])
        local series = counter[4]
        for_each(counted, function(name, tag)
            for _, one in ipairs(series) do
                local amount = count_of(name, one[2])
                if amount then
                    text:add(tag .. one[1], amount)
                end
            end
        end)
    end
end


local function print_durations(text, counted)
    text:family("request_duration_seconds", "histogram",
                "Time from a request's first byte to its end.")
    for_each(counted, function(name, tag)
        local sum = 0
        for _, bucket in ipairs(metrics.DURATIONS) do
            sum = sum + (count_of(name, bucket[2]) or 0)
            text:add(tag .. bucket[1], sum, "_bucket")
        end
        text:add(tag, count_of(name, metrics.SUM) or 0, "_sum")
        text:add(tag, sum, "_count")
    end)
end


-- Numbers by upstream's name that may be missing.
local function print_gauge(text, upstreams, name, help, amounts)
    text:family(name, "gauge", help)
    for_each(upstreams, function(upstream, tag)
        if amounts[upstream] then
            text:add(tag, amounts[upstream])
        end
    end)
end


local function print_tcp(text, upstreams)
    for _, family in ipairs(tcp_metrics.families) do
        text:family(family[1], family[2], family[3])
        for_each(upstreams, function(name, tag)
            tcp_metrics.each(name, family[1], function(labels, amount)
                text:add(tag .. labels, amount)
            end)
        end)
    end
end


-- What is 0 is left out, but for the peers that are up.
local function print_live(text, upstreams, counts_of)
    local circuits, queued = {}, {}
    text:family("peers", "gauge", "Peers by state; idle ones have weight 0 or another's address.")
    for_each(upstreams, function(name, tag)
        local blob = name ~= "" and store.get(name)
        if not blob then
            return
        end
        local counts, circuit = counts_of(name, blob)
        for _, state in ipairs(PEER_STATES) do
            if counts[state] > 0 or state == "up" then
                text:add(tag .. ',state="' .. state .. '"', counts[state])
            end
        end
        if circuit then
            circuits[#circuits + 1] = tag .. ',state="' .. circuit .. '"'
        end
        local cell = codec.head(blob).queue_cell
        local waiting = cell ~= 0 and load.sum(cell) or 0
        queued[name] = waiting > 0 and waiting or nil
    end)
    text:family("circuit_state", "gauge", "1 for the state of the circuit, where there is one.")
    for _, labels in ipairs(circuits) do
        text:add(labels, 1)
    end
    print_gauge(text, upstreams, "queue_length", "Requests that wait for a peer with room.", queued)
end


local function print_instance(text, facts)
    local summary = store.summary()
    text:single("membership_revision", "gauge", "Revision of the membership in force.",
                summary.revision)
    text:single("membership_persisted_revision", "gauge", "Revision that is safe on disk.",
                ctl:get("persisted_revision") or 0)
    text:single("membership_upstreams", "gauge", "Upstreams in force.", summary.upstreams)
    text:single("last_push_timestamp_seconds", "gauge",
                "Unix time of the last push applied; 0: none.", summary.pushed_at or 0)
    text:single("site_generation_info", "gauge", "The generation of the site that workers run.", 1,
                'generation="' .. facts.generation .. '"')
    text:single("site_changes_total", "counter", "Site changes that came through.",
                ctl:get("site_changes") or 0)
    text:single("site_refusals_total", "counter", "Site changes that were refused.",
                ctl:get("site_refusals") or 0)
    text:single("load_cells", "gauge", "Places for counting load that are in use.", load.used())
    text:single("load_cells_capacity", "gauge", "Places for counting load.", load.CAPACITY)
    text:single("workers", "gauge", "Worker processes configured.", ngx.worker.count())
    text:single("metrics_lost_total", "counter", "Increments lost because their dict is full.",
                ctl:get("metrics_lost") or 0)
    text:single("health_lost_total", "counter",
                "Findings on peers lost because their dict is full.", ctl:get("health_lost") or 0)
    text:family("shared_dict_free_bytes", "gauge", "Room left in whole pages.")
    for _, dict in ipairs(DICTS) do
        text:add('dict="' .. dict[1] .. '"', shared[dict[2]]:free_space())
    end
    text:family("shared_dict_capacity_bytes", "gauge", "Size of the shared dicts.")
    for _, dict in ipairs(DICTS) do
        text:add('dict="' .. dict[1] .. '"', shared[dict[2]]:capacity())
    end
    local states = {}
    for state in pairs(facts.nginx) do
        states[#states + 1] = state
    end
    sort(states)
    text:family("nginx_connections", "gauge", "Client connections by state.")
    for _, state in ipairs(states) do
        text:add('state="' .. state .. '"', tonumber(facts.nginx[state]))
    end
end


--- Prints all metrics but those of certificates. Yields.
-- @param facts `{generation, counts (of peers by state, and state of the circuit, of an upstream's
--   name and value), nginx = {name = count}}`
function _M.print(facts)
    metrics.flush()
    local text, upstreams, counted = new_text(), {}, {}
    local names = { "" }
    for _, name in ipairs(store.names()) do
        names[#names + 1] = name
    end
    sort(names)
    for _, name in ipairs(names) do
        local upstream = { name = name, tag = 'upstream="' .. label(name) .. '"' }
        upstreams[#upstreams + 1] = upstream
        if count_of(name, metrics.TOTAL) then
            counted[#counted + 1] = upstream
        end
        store.breathe()
    end
    print_counters(text, counted)
    print_durations(text, counted)
    print_gauge(text, upstreams, "requests_in_flight", "Requests under way or held.",
                metrics.in_flight())
    print_tcp(text, upstreams)
    print_gauge(text, upstreams, "tcp_connections_open", "TCP connections that are open.",
                tcp_metrics.open_by_name())
    print_live(text, upstreams, facts.counts)
    print_instance(text, facts)
    text:send()
end


return _M
